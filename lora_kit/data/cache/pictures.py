"""Reading pictures for the cache: bytes, hash, decoded views. What is hashed is what is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import NamedTuple

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lora_kit.data.buckets import Size
from lora_kit.data.cache.hints import PictureHints
from lora_kit.data.cache.keys import View
from lora_kit.data.cache.origin import digest, identity, read_bytes
from lora_kit.data.cache.views import Facts, Rendered, render
from lora_kit.data.pictures import Picture, read_picture
from lora_kit.data.records import Record
from lora_kit.data.sizes import KnownSize
from lora_kit.data.workers import worker_options
from lora_kit.errors import DataError
from lora_kit.progress import ProgressBar

Views = Callable[[Record, Facts], Sequence[View]]
"""The views that training needs of a picture. Must be picklable where workers are spawned."""


class Loaded(NamedTuple):
    """What reading one picture gave."""

    record: int
    """Index of its record."""
    facts: Facts | None
    """None if it is broken."""
    identity: str | None
    """What its bytes were known by, the same before and after they were read."""
    views: list[Rendered]
    reason: str
    """Why it cannot be used; empty if it can."""
    note: str = ""
    """What was wrong with it but did not keep it from being read."""


class PictureFiles(Dataset[Loaded]):
    """The pictures of some records, decoded; errors become results. Without `views`, only their facts."""

    def __init__(self, records: Sequence[Record], indices: Sequence[int], views: Views | None) -> None:
        self.records = records
        self.indices = indices
        self.views = views

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Loaded:
        index = self.indices[place]
        record = self.records[index]
        known_by = identity(record)
        try:
            facts, picture = decode(record)
        except DataError as error:
            return Loaded(index, None, None, [], str(error).removeprefix(f"{record.id}: "))
        if identity(record) != known_by:
            known_by = None  # it changed while it was read
        views = self.views(record, facts) if self.views else ()
        return Loaded(index, facts, known_by, [render(picture, view) for view in views], "", picture.note)


def decode(record: Record) -> tuple[Facts, Picture]:
    """A picture and the facts of the very bytes that it was decoded from. Raises DataError naming the record."""
    content, mask = read_bytes(record)
    held = replace(record, open=partial(Image.open, BytesIO(content)))
    if mask is not None:
        held = replace(held, mask=partial(Image.open, BytesIO(mask)))
    picture = read_picture(held)
    width, height = picture.image.size
    return Facts(digest(content, mask), width, height, picture.animated), picture


def survey(records: Sequence[Record], hints: PictureHints) -> list[Facts | None]:
    """What the hints know of each record's picture. Costs a look at each file's size and time, 20 µs or so."""
    known = (identity(record) for record in records)
    return [hints.find(name) if name is not None else None for name in known]


def known_size(hints: PictureHints) -> KnownSize:
    """What `open_training_set` can take instead of reading the pictures' headers."""

    def known(record: Record) -> Size | None:
        name = identity(record)
        facts = hints.find(name) if name is not None else None
        return (facts.width, facts.height) if facts else None

    return known


def read_facts(records: Sequence[Record], hints: PictureHints, workers: int, bar: ProgressBar) -> list[Facts | None]:
    """The facts of each record's picture, read where there is no hint; None where the picture is broken."""
    facts = survey(records, hints)
    unknown = [index for index, fact in enumerate(facts) if fact is None]
    if not unknown:
        return facts
    loader: DataLoader[Loaded] = DataLoader(
        PictureFiles(records, unknown, None), batch_size=None, **worker_options(workers)
    )
    with closing(bar(loader, "Reading pictures", len(unknown))) as stream:
        for loaded in stream:
            facts[loaded.record] = loaded.facts
            if loaded.facts is not None and loaded.identity is not None:
                hints.add(loaded.identity, loaded.facts)
    hints.flush()
    return facts
