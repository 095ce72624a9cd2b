"""One pass over all pictures before training: broken ones are found now, so that the stream stays as planned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_kit.data.bucket_places import has_buckets
from lora_kit.data.buckets import Size, fills
from lora_kit.data.crops import covering_box, cut_picture, pixels_of
from lora_kit.data.masks import mask_cells
from lora_kit.data.pictures import Picture, read_picture
from lora_kit.data.records import MAX_NAMED, Flaw, Record, name_some, settle_flaws
from lora_kit.data.training_set import TrainingSet
from lora_kit.data.workers import worker_options
from lora_kit.errors import DataError
from lora_kit.progress import ProgressBar, progress


class View(NamedTuple):
    """A picture at one of its sizes."""

    pixels: Tensor
    """float32 [3, height, width]."""
    mask: Tensor | None
    """float32 [h, w] in 0..1 over the latent's cells, if it has one."""


UseViews = Callable[[int, Sequence[View]], None]
"""(record, its picture at each of its sizes)."""


class Scanned(NamedTuple):
    """What one picture turned out to be."""

    views: list[View]
    """At each of its sizes, if asked for and readable."""
    reason: str
    """Why it cannot be used; empty if it can."""
    animated: bool
    enlarged: bool
    """It is smaller than a size that it is trained at."""
    note: str = ""
    """What was wrong with it but did not keep it from being read."""


class Pictures(Dataset[Scanned]):
    """Every record's picture once, in order; errors become results."""

    def __init__(self, records: list[Record], sizes: list[list[Size]], latent_factor: int | None):
        """Sizes: those that each record is trained at. latent_factor: as TrainingSet's; None: keep no pixels."""
        self.records = records
        self.sizes = sizes
        self.latent_factor = latent_factor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Scanned:
        record, sizes = self.records[index], self.sizes[index]
        try:
            picture = read_picture(record)
        except DataError as error:
            return Scanned([], str(error).removeprefix(f"{record.id}: "), False, False)
        factor = self.latent_factor
        views = [] if factor is None else [view_of(picture, size, factor) for size in sizes]
        enlarged = not all(fills(picture.image.size, size) for size in sizes)
        return Scanned(views, "", picture.animated, enlarged, picture.note)


def view_of(picture: Picture, size: Size, latent_factor: int) -> View:
    """The centre of a picture, scaled to a size, and of its mask."""
    pixels = pixels_of(cut_picture(picture.image, size))
    if picture.mask is None:
        return View(pixels, None)
    return View(pixels, mask_cells(picture.mask, covering_box(picture.image.size, size), size, latent_factor))


def check_pictures(training_set: TrainingSet, bar: ProgressBar = progress) -> None:
    """Decode every picture once, unless that has been done.

    Broken ones are dropped and listed in `training_set.skipped`, or, with `on_error: raise`, up to ten are named
    in a DataError.
    """
    if not training_set.checked:
        scan_pictures(training_set, bar, "Checking pictures", None)


def scan_pictures(training_set: TrainingSet, bar: ProgressBar, what: str, use: UseViews | None) -> None:
    """`check_pictures` that also hands each readable picture's views to `use(record, views)`, in order."""
    records, section = training_set.records, training_set.section
    raises = section.on_error == "raise"
    sizes = [training_set.places.sizes_of(record) for record in range(len(records))]
    pictures = Pictures(records, sizes, training_set.latent_factor if use is not None else None)
    loader: DataLoader[Scanned] = DataLoader(pictures, batch_size=None, **worker_options(section.workers))
    findings = _Findings({}, [], [], {})
    with closing(bar(loader, what, len(records))) as results:
        for index, found in enumerate(results):
            findings.note(index, records[index].id, found)
            if raises and len(findings.broken) == MAX_NAMED:
                break
            # With `raise`, nothing is worth encoding after the first broken picture: only the others' names are.
            if use is not None and found.views and not (raises and findings.broken):
                use(index, found.views)
    _settle(training_set, findings, raises)


class _Findings(NamedTuple):
    broken: dict[int, str]
    animated: list[str]
    enlarged: list[str]
    notes: dict[str, str]
    """Record's id → what was wrong."""

    def note(self, index: int, record_id: str, found: Scanned) -> None:
        if found.reason:
            self.broken[index] = found.reason
        if found.animated:
            self.animated.append(record_id)
        if found.enlarged:
            self.enlarged.append(record_id)
        if found.note:
            self.notes[record_id] = found.note


def _settle(training_set: TrainingSet, findings: _Findings, raises: bool) -> None:
    if raises:
        flaws = [Flaw(training_set.records[index].id, reason) for index, reason in findings.broken.items()]
        settle_flaws(flaws, 0, "raise", all_known=len(flaws) < MAX_NAMED)
    training_set.drop(findings.broken)
    training_set.checked = True
    tell_findings(training_set, findings.animated, findings.enlarged, findings.notes)


def tell_findings(
    training_set: TrainingSet, animated: list[str], enlarged: list[str], notes: Mapping[str, str]
) -> None:
    """Notices about pictures, by their records' ids, that are used in a way that their owner may not expect.

    notes: id → what was wrong with it but did not keep it from being read.
    """
    _notice(training_set, animated, "have several frames, of which the first is used")
    section = training_set.section
    than = "their bucket" if has_buckets(section) else f"{training_set.places.sizes[0][0]} pixels"
    _notice(training_set, enlarged, f"are smaller than {than} and were enlarged")
    for note in dict.fromkeys(notes.values()):
        _notice(training_set, [name for name, own in notes.items() if own == note], f"were read, but {note}")


def _notice(training_set: TrainingSet, ids: list[str], what: str) -> None:
    if ids:
        training_set.notices.append(f"{len(ids)} of {len(training_set.records)} pictures {what}: {name_some(ids)}.")
