"""One pass over all pictures before training: broken ones are found now, so that the stream stays as planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_kit.data.bucket_places import has_buckets
from lora_kit.data.buckets import Size, fills
from lora_kit.data.crops import cut_picture, pixels_of
from lora_kit.data.pictures import read_picture
from lora_kit.data.records import MAX_NAMED, Flaw, Record, name_some, settle_flaws
from lora_kit.data.training_set import TrainingSet
from lora_kit.data.workers import worker_options
from lora_kit.errors import DataError
from lora_kit.progress import ProgressBar, progress

UsePixels = Callable[[int, Sequence[Tensor]], None]
"""(record, its picture's pixels at each of its sizes, float32 [3, height, width])."""


class Scanned(NamedTuple):
    """What one picture turned out to be."""

    pixels: list[Tensor]
    """At each of its sizes float32 [3, height, width], if asked for and readable."""
    reason: str
    """Why it cannot be used; empty if it can."""
    animated: bool
    enlarged: bool
    """It is smaller than a size that it is trained at."""


class Pictures(Dataset[Scanned]):
    """Every record's picture once, in order; errors become results."""

    def __init__(self, records: list[Record], sizes: list[list[Size]], keep_pixels: bool):
        """Sizes: those that each record is trained at."""
        self.records = records
        self.sizes = sizes
        self.keep_pixels = keep_pixels

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Scanned:
        record, sizes = self.records[index], self.sizes[index]
        try:
            picture = read_picture(record)
        except DataError as error:
            return Scanned([], str(error).removeprefix(f"{record.id}: "), False, False)
        pixels = [pixels_of(cut_picture(picture.image, size)) for size in sizes] if self.keep_pixels else []
        enlarged = not all(fills(picture.image.size, size) for size in sizes)
        return Scanned(pixels, "", picture.animated, enlarged)


def check_pictures(training_set: TrainingSet, bar: ProgressBar = progress) -> None:
    """Decode every picture once, unless that has been done.

    Broken ones are dropped and listed in `training_set.skipped`, or, with `on_error: raise`, up to ten are named
    in a DataError.
    """
    if not training_set.checked:
        scan_pictures(training_set, bar, "Checking pictures", None)


def scan_pictures(training_set: TrainingSet, bar: ProgressBar, what: str, use: UsePixels | None) -> None:
    """`check_pictures` that also hands each readable picture's pixels to `use(record, pixels)`, in order."""
    records, section = training_set.records, training_set.section
    raises = section.on_error == "raise"
    sizes = [training_set.places.sizes_of(record) for record in range(len(records))]
    pictures = Pictures(records, sizes, use is not None)
    loader: DataLoader[Scanned] = DataLoader(pictures, batch_size=None, **worker_options(section.workers))
    findings = _Findings({}, [], [])
    with closing(bar(loader, what, len(records))) as results:
        for index, found in enumerate(results):
            findings.note(index, records[index].id, found)
            if raises and len(findings.broken) == MAX_NAMED:
                break
            # With `raise`, nothing is worth encoding after the first broken picture: only the others' names are.
            if use is not None and found.pixels and not (raises and findings.broken):
                use(index, found.pixels)
    _settle(training_set, findings, raises)


class _Findings(NamedTuple):
    broken: dict[int, str]
    animated: list[str]
    enlarged: list[str]

    def note(self, index: int, record_id: str, found: Scanned) -> None:
        if found.reason:
            self.broken[index] = found.reason
        if found.animated:
            self.animated.append(record_id)
        if found.enlarged:
            self.enlarged.append(record_id)


def _settle(training_set: TrainingSet, findings: _Findings, raises: bool) -> None:
    if raises:
        flaws = [Flaw(training_set.records[index].id, reason) for index, reason in findings.broken.items()]
        settle_flaws(flaws, 0, "raise", all_known=len(flaws) < MAX_NAMED)
    training_set.drop(findings.broken)
    training_set.checked = True
    _notice(training_set, findings.animated, "have several frames, of which the first is used")
    section = training_set.section
    than = "their bucket" if has_buckets(section) else f"{training_set.places.sizes[0][0]} pixels"
    _notice(training_set, findings.enlarged, f"are smaller than {than} and were enlarged")


def _notice(training_set: TrainingSet, ids: list[str], what: str) -> None:
    if ids:
        training_set.notices.append(f"{len(ids)} of {len(training_set.records)} pictures {what}: {name_some(ids)}.")
