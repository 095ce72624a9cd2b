"""Which pictures are trained at which sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_kit.data.buckets import Fit, Size, fit_to_all
from lora_kit.data.records import Record
from lora_kit.recipe import DataSection


@dataclass(frozen=True)
class Places:
    """All m pairs of a picture and a size that it is trained at, in the records' order. A picture has one or more."""

    sizes: tuple[Size, ...]
    """The buckets that hold a picture, from the smallest area on."""
    record: NDArray[np.int64]
    """[m]: index of each place's record."""
    bucket: NDArray[np.int64]
    """[m]: index in `sizes`."""
    row: NDArray[np.int64]
    """[m]: number within its bucket, counted in the places' order."""
    first: NDArray[np.int64]
    """[records + 1]: places `first[r]` … `first[r + 1]` - 1 are those of record r."""
    lowered: list[int]
    """Records whose picture is smaller than its bucket and got a smaller one."""

    def of(self, record: int) -> range:
        """The places of a record."""
        return range(int(self.first[record]), int(self.first[record + 1]))

    def size(self, place: int) -> Size:
        """The size of a place."""
        return self.sizes[self.bucket[place]]

    def sizes_of(self, record: int) -> list[Size]:
        """The sizes that a record is trained at."""
        return [self.size(place) for place in self.of(record)]


def place_pictures(records: Sequence[Record], pictures: Sequence[Size | None] | None, section: DataSection) -> Places:
    """Find each record's sizes.

    pictures: their sizes, None where one cannot be read; needed only where `section.buckets` is there.
    """
    known: Sequence[Size | None] = pictures if pictures is not None else [None] * len(records)
    fits = [fits_of(record, picture, section) for record, picture in zip(records, known, strict=True)]
    return _arrange(fits)


def fits_of(record: Record, picture: Size | None, section: DataSection) -> list[Fit]:
    """The sizes that a record is trained at, the smallest resolution's first."""
    return fit_to_all(picture, resolutions_of(record, section), section.buckets)


def resolutions_of(record: Record, section: DataSection) -> list[int]:
    """The resolutions that the recipe asks for: the source's, or those of `buckets`, or the data set's."""
    own = section.sources[record.source].resolution
    if own is not None:
        return [own]
    return (section.buckets.resolutions if section.buckets else None) or [section.resolution]


def has_buckets(section: DataSection) -> bool:
    """Whether pictures may be of several sizes: there are buckets, or sources with resolutions of their own."""
    own = {source.resolution or section.resolution for source in section.sources}
    return section.buckets is not None or len(own) > 1


def _arrange(fits: Sequence[Sequence[Fit]]) -> Places:
    sizes = sorted({fit.size for each in fits for fit in each}, key=lambda size: (size[0] * size[1], size))
    number = {size: index for index, size in enumerate(sizes)}
    counts = np.array([len(each) for each in fits], dtype=np.int64)
    bucket = np.array([number[fit.size] for each in fits for fit in each], dtype=np.int64)
    held = np.bincount(bucket)
    row = np.empty_like(bucket)
    row[np.argsort(bucket, kind="stable")] = np.arange(len(bucket)) - np.repeat(np.cumsum(held) - held, held)
    return Places(
        sizes=tuple(sizes),
        record=np.repeat(np.arange(len(fits)), counts),
        bucket=bucket,
        row=row,
        first=np.concatenate([[0], np.cumsum(counts)]),
        lowered=[index for index, each in enumerate(fits) if any(fit.lowered for fit in each)],
    )
