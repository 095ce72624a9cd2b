"""The endless stream of samples: position → sample, a pure function of the records, the section and the seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lora_kit.data.batch import Batch
from lora_kit.data.order import Chances, chances, permutation
from lora_kit.data.pictures import picture_tensor, read_picture, square_picture
from lora_kit.data.records import Flaw, Record, Records, fingerprint, settle_flaws
from lora_kit.data.sources import open_records
from lora_kit.errors import DataError
from lora_kit.recipe import DataSection


class Sample(NamedTuple):
    """One training example; `Batch` says what the fields are."""

    id: str
    position: int
    """Index within the optimizer step."""
    caption: str
    pixels: Tensor | None
    """float32 [3, H, W]."""
    latent_mean: Tensor | None
    latent_std: Tensor | None


class Latents(NamedTuple):
    """Posterior means and deviations of one version of all records, float32 [n, c, h, w] on the CPU."""

    mean: Tensor
    std: Tensor


class TrainingSet(Dataset[Sample]):
    """`training_set[k]` is the sample at position k of the endless stream, k from 0.

    Epoch k // n goes through all n samples (each record `repeats` times) in an order of its own. Order, flip,
    crop and caption dropout depend on (seed, epoch, sample) alone, so a resumed run, or one cut differently
    into processes and micro-batches, sees the very same samples.
    """

    def __init__(self, records: Records, section: DataSection, seed: int, skip: Sequence[tuple[str, str]] = ()):
        """Skip: (id, reason) of records to leave out beforehand, such as an earlier run's `skipped`."""
        self.records = list(records)
        self.section = section
        self.seed = seed
        self.skipped: list[Flaw] = list(records.skipped)
        """Records left out under `on_error: skip`, each with its reason."""
        self.notices: list[str] = list(records.notices)
        """What the user should be told once."""
        self.latents: Latents | None = None
        self.mirrored: Latents | None = None
        """Latents of the mirrored pictures, if `flip` is on."""
        self.checked = False
        """Every picture has been decoded once."""
        self._number_samples()
        wanted = dict(skip)
        self.drop({i: wanted[record.id] for i, record in enumerate(self.records) if record.id in wanted})

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self._samples)

    @property
    def record_count(self) -> int:
        """Usable pictures."""
        return len(self.records)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, captions and repeats in order: a resumed run whose data changed has another."""
        return fingerprint(self.records)

    @property
    def cacheable(self) -> bool:
        """Whether the section asks for cached latents and its crop allows them."""
        return self.section.cache == "memory" and self.section.crop == "center"

    def __getitem__(self, index: int) -> Sample:
        """The sample at absolute position `index`. Raises DataError if its picture cannot be read any more."""
        epoch, place = divmod(index, len(self))
        number = int(permutation(self.seed, epoch, len(self))[place])
        draws = chances(self.seed, epoch, number)
        record = int(self._samples[number])
        caption = "" if draws.caption < self.section.caption_dropout else self.caption(record)
        return self._sample(record, index % self.section.batch_size, caption, draws)

    def plain(self, record: int) -> Sample:
        """A record as it is, for held-out figures: centre crop, no flip, its caption; position = record."""
        middle = Chances(flip=1.0, caption=1.0, across=0.5, down=0.5)
        return self._sample(record, record, self.caption(record), middle, centered=True)

    def caption(self, record: int) -> str:
        """The record's caption, after the trigger word."""
        return f"{self.section.trigger} {self.records[record].caption}".strip()

    def captions(self) -> list[str]:
        """All captions, in the records' order."""
        return [self.caption(record) for record in range(self.record_count)]

    def pictures(self) -> list[Image.Image]:
        """All pictures as RGB squares of `resolution`, centre crop, in the records' order. Opens the files."""
        return [square_picture(read_picture(record).image, self.section.resolution) for record in self.records]

    def drop(self, broken: Mapping[int, str]) -> None:
        """Leave out the records at these indices, for these reasons. Raises DataError if none remains."""
        if not broken:
            return
        flaws = [Flaw(self.records[index].id, reason) for index, reason in sorted(broken.items())]
        settle_flaws(flaws, len(self.records) - len(flaws), "skip")
        self.skipped += flaws
        self.records = [record for index, record in enumerate(self.records) if index not in broken]
        self._number_samples()

    def _number_samples(self) -> None:
        if not self.records:
            raise DataError("The data set has no records. Check data.sources and their where.")
        repeats = [record.repeats for record in self.records]
        self._samples = np.repeat(np.arange(len(self.records)), repeats)

    def _sample(self, record: int, position: int, caption: str, draws: Chances, centered: bool = False) -> Sample:
        flip = self.section.flip and draws.flip < 0.5
        record_id = self.records[record].id
        if self.latents is not None:
            latents = self.mirrored if flip and self.mirrored is not None else self.latents
            return Sample(record_id, position, caption, None, latents.mean[record], latents.std[record])
        across, down = (0.5, 0.5) if centered or self.section.crop == "center" else (draws.across, draws.down)
        pixels = load_pixels(self.records[record], self.section.resolution, across, down)
        return Sample(record_id, position, caption, pixels.flip(-1) if flip else pixels, None, None)


def open_training_set(section: DataSection, seed: int, folder: Path | None = None) -> TrainingSet:
    """`open_records` as a TrainingSet. Arguments and errors as there."""
    return TrainingSet(open_records(section, folder), section, seed)


def load_pixels(record: Record, side: int, across: float = 0.5, down: float = 0.5) -> Tensor:
    """`read_picture` and `picture_tensor`: float32 [3, side, side] in -1..1."""
    return picture_tensor(read_picture(record).image, side, across, down)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of equal kind (all pixels or all latents) → one micro-batch."""
    return Batch(
        ids=[sample.id for sample in samples],
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        captions=[sample.caption for sample in samples],
        pixels=_stack([sample.pixels for sample in samples]),
        latent_mean=_stack([sample.latent_mean for sample in samples]),
        latent_std=_stack([sample.latent_std for sample in samples]),
    )


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None
