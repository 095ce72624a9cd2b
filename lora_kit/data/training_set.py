"""The endless stream of samples: position → sample, a pure function of the records, the section and the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from lora_kit.data.bucket_order import Order, order_of, samples_of
from lora_kit.data.bucket_places import has_buckets, place_pictures
from lora_kit.data.buckets import Size
from lora_kit.data.captions import CaptionChances, Captioner
from lora_kit.data.crops import covering_box, cut_picture, pixels_of
from lora_kit.data.masks import mask_cells
from lora_kit.data.order import Chances, chances
from lora_kit.data.pictures import read_picture, square_picture
from lora_kit.data.records import Flaw, Records, fingerprint, name_some, settle_flaws
from lora_kit.data.samples import KeptLatents, Sample
from lora_kit.data.sizes import KnownSize, read_sizes
from lora_kit.data.sources import open_records
from lora_kit.progress import ProgressBar, progress
from lora_kit.recipe import DataSection, SourceSection, expand_sources


class TrainingSet(Dataset[Sample]):
    """`training_set[k]` is the sample at position k of the endless stream, k from 0.

    Each epoch goes through all samples (each record `repeats` times at each of its sizes) in an order of its own,
    which `order` knows. Order, flip, crop and caption dropout depend on (seed, epoch, sample) alone, so a resumed
    run, or one cut differently into processes and micro-batches, sees the very same samples.
    """

    def __init__(
        self,
        records: Records,
        section: DataSection,
        seed: int,
        skip: Sequence[tuple[str, str]] = (),
        sizes: Sequence[Size | None] | None = None,
        latent_factor: int = 8,
    ):
        """Skip: (id, reason) of records to leave out beforehand, such as an earlier run's `skipped`.

        sizes: those of the records' pictures, as `read_sizes` gives them; needed with `data.buckets`.
        latent_factor: pixels of a latent cell's side, which masks are averaged over. 8 for Stable Diffusion.
        """
        assert sizes is not None or section.buckets is None
        self.records = list(records)
        self.sizes = None if sizes is None else list(sizes)
        self.section = section
        self.seed = seed
        self.latent_factor = latent_factor
        self.skipped: list[Flaw] = list(records.skipped)
        """Records left out under `on_error: skip`, each with its reason."""
        self.captioner = Captioner(section)
        self.notices: list[str] = [*records.notices, *self.captioner.notices(self.records)]
        """What the user should be told once."""
        self.latents: KeptLatents | None = None
        """Those of all places, once they are encoded; None: samples carry pixels."""
        self.keeps_pixels = False
        """Samples carry pixels even where latents are kept: the model's family needs them."""
        self.fills_masks = False
        """Masks say what is to be filled, pixel by pixel, not what counts in the loss."""
        self.checked = False
        """Every picture has been decoded once."""
        self._number_samples()
        wanted = dict(skip)
        self.drop({i: wanted[record.id] for i, record in enumerate(self.records) if record.id in wanted})
        self._tell_lowered()

    def __len__(self) -> int:
        """Samples in an epoch, without those that a wrapping bucket shows once more."""
        return len(self._samples)

    @property
    def record_count(self) -> int:
        """Usable pictures."""
        return len(self.records)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, captions and repeats, and of the sizes trained at, in order: a resumed run whose data changed
        has another."""
        own = fingerprint(self.records)
        if not has_buckets(self.section):
            return own
        sizes = [self.places.sizes_of(record) for record in range(self.record_count)]
        return hashlib.sha256(f"{own} {sizes}".encode()).hexdigest()

    @property
    def cacheable(self) -> bool:
        """Whether the section asks for cached latents and its crop allows them."""
        return self.section.cache == "memory" and self.section.crop == "center"

    def __getitem__(self, index: int) -> Sample:
        """The sample at absolute position `index`. Raises DataError if its picture cannot be read any more."""
        step, position = divmod(index, self.section.batch_size)
        turn = self.order.locate(index)
        draws = chances(self.seed, turn.epoch, turn.chance)
        place = int(self._samples[turn.sample])
        told = CaptionChances(self.seed, turn.epoch, turn.chance)
        dropped = draws.caption < self.section.caption_dropout
        caption = "" if dropped else self.caption(int(self.places.record[place]), told)
        return self._sample(place, caption, draws)._replace(position=position, step_samples=self.order.size_of(step))

    def plain(self, record: int) -> Sample:
        """A record as it is, for held-out figures: its first size, centre crop, no flip, its caption; position =
        record."""
        middle = Chances(flip=1.0, caption=1.0, across=0.5, down=0.5)
        place = self.places.of(record)[0]
        return self._sample(place, self.caption(record), middle, centered=True)._replace(position=record)

    def caption(self, record: int, draws: CaptionChances | None = None) -> str:
        """The record's caption by `data.captions`, after the trigger word; without `draws` nothing in it is random."""
        return self.captioner.caption(self.records[record], draws)

    def captions(self) -> list[str]:
        """One caption of each record, nothing random, in the records' order: those that `plain` gives."""
        return [self.caption(record) for record in range(self.record_count)]

    def longest_captions(self) -> list[str]:
        """`Captioner.longest` of all records."""
        return [text for record in self.records for text in self.captioner.longest(record)]

    def possible_captions(self, record: int, limit: int) -> list[str] | None:
        """`Captioner.possible` of a record."""
        return self.captioner.possible(self.records[record], limit)

    def pictures(self) -> list[Image.Image]:
        """All pictures as RGB squares of `resolution`, centre crop, in the records' order. Opens the files."""
        return [square_picture(read_picture(record).image, self.section.resolution) for record in self.records]

    def ignore_captions(self) -> int:
        """Take the captions from the records, for a model that reads none; how many pictures had one."""
        count = sum(bool(record.caption) for record in self.records)
        self.records = [replace(record, caption="", captions=()) for record in self.records]
        return count

    def drop(self, broken: Mapping[int, str]) -> None:
        """Leave out the records at these indices, for these reasons. Raises DataError if none remains."""
        if not broken:
            return
        flaws = [Flaw(self.records[index].id, reason) for index, reason in sorted(broken.items())]
        settle_flaws(flaws, len(self.records) - len(flaws), "skip")
        self.skipped += flaws
        self.records = [record for index, record in enumerate(self.records) if index not in broken]
        if self.sizes is not None:
            self.sizes = [size for index, size in enumerate(self.sizes) if index not in broken]
        self._number_samples()

    def _number_samples(self) -> None:
        self.places = place_pictures(self.records, self.sizes, self.section)
        self._samples = samples_of(self.records, self.places)
        self.order: Order = order_of(self._samples, self.places, self.section, self.seed)
        """Which sample stands where in the stream."""

    def _tell_lowered(self) -> None:
        ids = [self.records[record].id for record in self.places.lowered]
        if ids:
            self.notices.append(
                f"{len(ids)} of {len(self.records)} pictures are smaller than their bucket and go to a smaller one "
                f"(data.buckets.upscale: true enlarges them instead): {name_some(ids)}."
            )

    def _sample(self, place: int, caption: str, draws: Chances, centered: bool = False) -> Sample:
        flip = self.section.flip and draws.flip < 0.5
        record, size = self.records[self.places.record[place]], self.places.size(place)
        sample = Sample(record.id, 0, caption, None, None, None)
        sample = sample._replace(loss_weight=record.loss_weight, from_base=record.from_base)
        latent = self.latents.read(place, flip) if self.latents is not None else None
        if latent is not None:
            mask = None if self.fills_masks else latent.mask
            sample = sample._replace(latent_mean=latent.mean, latent_std=latent.std, mask=mask)
            if not self.keeps_pixels:
                return sample
        across, down = (0.5, 0.5) if centered or self.section.crop == "center" else (draws.across, draws.down)
        picture = read_picture(record)
        pixels = pixels_of(cut_picture(picture.image, size, across, down))
        sample = sample._replace(pixels=pixels.flip(-1) if flip else pixels)
        if picture.mask is None or (latent is not None and not self.fills_masks):
            return sample
        box = covering_box(picture.image.size, size, across, down)
        mask = mask_cells(picture.mask, box, size, 1 if self.fills_masks else self.latent_factor)
        mask = mask.flip(-1) if flip else mask
        return sample._replace(hole=mask[None]) if self.fills_masks else sample._replace(mask=mask)


def open_training_set(
    section: DataSection,
    seed: int,
    folder: Path | None = None,
    bar: ProgressBar = progress,
    known: KnownSize | None = None,
    latent_factor: int = 8,
) -> TrainingSet:
    """`open_records` as a TrainingSet; with `data.buckets` the pictures' headers are read too. Arguments and errors as
    there.

    known: sizes of pictures whose headers need not be read. latent_factor: as TrainingSet's.
    """
    section = expand_sources(section, folder or Path.cwd())
    records = open_records(section, folder)
    sizes = read_sizes(records, section.workers, bar, known) if section.buckets else None
    return TrainingSet(records, section, seed, sizes=sizes, latent_factor=latent_factor)


def plain_section(section: DataSection, sources: Sequence[SourceSection]) -> DataSection:
    """The section of held-out pictures: these sources, nothing random, each at one resolution."""
    buckets = section.buckets and section.buckets.model_copy(update={"resolutions": None})
    plain: dict[str, Any] = {"flip": False, "caption_dropout": 0.0, "crop": "center", "buckets": buckets}
    return section.model_copy(update={**plain, "sources": list(sources)})
