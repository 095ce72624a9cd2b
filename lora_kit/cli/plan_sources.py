"""What a recipe's sources hold and what an epoch of them is, for human eyes and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

    from lora_kit.data.bucket_plan import BucketPlan
    from lora_kit.data.sources.survey import SourceFacts, Survey
    from lora_kit.recipe import DataSection

_MOST_NAMED = 10


class DataFacts(NamedTuple):
    """Everything a plan says of the data."""

    survey: Survey
    buckets: BucketPlan | None
    """None if pictures are all of one size, or a source is on the hub."""

    @property
    def samples(self) -> int | None:
        """In an epoch; None if a source is on the hub."""
        if self.buckets:
            return self.buckets.samples
        return None if self.survey.records is None else sum(record.repeats for record in self.survey.records)


def data_facts(section: DataSection) -> DataFacts:
    """Count the local sources; with buckets, pictures' headers are read too: about 0.1 ms each. Raises DataError as
    `open_records`."""
    from lora_kit.data.bucket_places import has_buckets
    from lora_kit.data.bucket_plan import read_bucket_plan
    from lora_kit.data.sources.survey import survey_sources

    survey = survey_sources(section)
    if survey.records is None or not has_buckets(survey.section):
        return DataFacts(survey, None)
    plan = read_bucket_plan(survey.records, survey.section)
    # A picture that is trained at several sizes is a sample at each.
    rows = [
        source._replace(samples=samples, share=samples / plan.samples)
        for source, samples in zip(survey.sources, plan.source_samples, strict=True)
    ]
    return DataFacts(survey._replace(sources=rows), plan)


def source_json(survey: Survey) -> dict[str, Any]:
    """As the document of `lora-kit plan --json` holds it."""
    return {
        "sources": [source._asdict() for source in survey.sources],
        "notices": survey.notices,
        "unusable": [flaw._asdict() for flaw in survey.unusable],
    }


def source_table(survey: Survey) -> Table:
    """A rich table: a row for each source."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("source", overflow="fold")
    table.add_column("read as", overflow="fold")
    for name in ("pictures", "repeats", "share", "px"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("besides", overflow="fold")
    for name, source in zip(_names(survey.sources), survey.sources, strict=True):
        table.add_row(name, source.kind, *_cells(source), ", ".join(_remarks(source)))
    return table


def source_lines(survey: Survey) -> Iterator[str]:
    """What the table cannot say: notices, and records that cannot be used."""
    yield from (f"data: {notice}" for notice in survey.notices)
    if survey.unusable:
        yield f"data: records that cannot be used and will be left out: {len(survey.unusable):,}"
        yield from (f"  {name}: {reason}" for name, reason in survey.unusable[:_MOST_NAMED])
        if len(survey.unusable) > _MOST_NAMED:
            yield f"  … and {len(survey.unusable) - _MOST_NAMED:,} more"


def _names(sources: Sequence[SourceFacts]) -> list[str]:
    """Last part of each path, or all of those that share it."""
    short = [source.path if source.pictures is None else Path(source.path).name for source in sources]
    return [source.path if short.count(name) > 1 else name for name, source in zip(short, sources, strict=True)]


def _cells(source: SourceFacts) -> tuple[str, ...]:
    low, high = source.repeats or (0, 0)
    return (
        "not counted" if source.pictures is None else f"{source.pictures:,}",
        "" if not source.repeats else f"{low:,}" if low == high else f"{low:,}-{high:,}",
        "" if source.share is None else f"{source.share:.1%}",
        ", ".join(map(str, source.resolutions)),
    )


def _remarks(source: SourceFacts) -> Iterator[str]:
    if source.weight is not None:
        yield f"weight {source.weight:g}"
    if source.loss_weight != 1:
        yield f"loss × {source.loss_weight:g}"
    if source.regularisation:
        every = source.regularisation == source.pictures
        yield "regularisation" if every else f"{source.regularisation:,} regularisation"
    if source.from_base:
        yield "target: the base's prediction"
    if source.masks:
        yield f"{source.masks:,} masks"
    if source.alpha == "mask":
        yield "alpha as mask"
    elif source.alpha != "white":
        yield f"alpha on {source.alpha}"
    if source.unusable:
        yield f"{source.unusable:,} unusable"
