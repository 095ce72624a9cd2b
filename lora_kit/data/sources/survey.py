"""What a recipe's sources hold, for a reader: a row for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lora_kit.data.records import Flaw, Record, Records
from lora_kit.data.sources.opening import gather, read_local
from lora_kit.data.sources.source import Found
from lora_kit.recipe import DataSection, SourceSection, expand_sources


class SourceFacts(NamedTuple):
    """One source."""

    path: str
    kind: str
    """How it is read: `caption files`, `metadata.csv`, `N_name folders`, `3 tar shards`, `hub data set`."""
    pictures: int | None
    """None for a data set of the hub: counting would download it. So are the other counts."""
    unusable: int | None
    """Records without a picture, a caption or a place in the source; a picture that cannot be decoded is not known
    yet."""
    repeats: tuple[int, int] | None
    """The smallest and the largest of its pictures, weights and regularisation counted in."""
    samples: int | None
    """In an epoch: pictures times their repeats, at one size each."""
    share: float | None
    """Of all samples, 0..1; by its weight where sources are not counted."""
    weight: float | None
    resolutions: list[int]
    """Pixels."""
    loss_weight: float
    regularisation: int | None
    """How many of its pictures are regularisation pictures."""
    from_base: bool
    """The target is the base model's own prediction."""
    alpha: str
    """What becomes of transparency."""
    masks: int | None
    """Pictures with a mask of their own beside them, or in a column."""


class Survey(NamedTuple):
    """All sources."""

    section: DataSection
    """The one asked for, with the sources of its data-set TOMLs."""
    sources: list[SourceFacts]
    records: Records | None
    """None if a source is on the hub."""
    notices: list[str]
    unusable: list[Flaw]


def survey_sources(section: DataSection, folder: Path | None = None) -> Survey:
    """Read the local sources and count them. Opens no picture. Arguments and errors as of `open_records`."""
    folder = folder or Path.cwd()
    section = expand_sources(section, folder)
    found = read_local(section, folder)
    known = [part for part in found if part is not None]
    records = gather(known, section.on_error)
    shares = _shares(section, found)
    rows = [
        _facts(section, source, part, share) for source, part, share in zip(section.sources, found, shares, strict=True)
    ]
    whole = records if len(known) == len(found) else None
    return Survey(section, rows, whole, records.notices, records.skipped)


def _facts(section: DataSection, source: SourceSection, found: Found | None, share: float | None) -> SourceFacts:
    held: Sequence[Record] | None = None if found is None else found.records
    repeats = [record.repeats for record in held or ()]
    several = section.buckets.resolutions if section.buckets else None
    return SourceFacts(
        path=source.path,
        kind="hub data set" if found is None else found.kind,
        pictures=None if held is None else len(held),
        unusable=None if found is None else len(found.flaws),
        repeats=(min(repeats), max(repeats)) if repeats else None,
        samples=None if held is None else sum(repeats),
        share=share,
        weight=source.weight,
        resolutions=[source.resolution] if source.resolution else several or [section.resolution],
        loss_weight=source.loss_weight,
        regularisation=None if held is None else sum(record.is_regularisation for record in held),
        from_base=source.target == "base",
        alpha=source.alpha or section.alpha,
        masks=None if held is None else sum(record.mask is not None for record in held),
    )


def _shares(section: DataSection, found: Sequence[Found | None]) -> list[float | None]:
    samples = [None if part is None else sum(record.repeats for record in part.records) for part in found]
    counted = [count for count in samples if count is not None]
    if len(counted) == len(samples):
        return [count / sum(counted) for count in counted]
    weights = [source.weight for source in section.sources if source.weight is not None]
    # All sources have a weight or none has.
    return [weight / sum(weights) for weight in weights] if weights else [None] * len(samples)
