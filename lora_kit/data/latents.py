"""Latents in memory: the VAE sees each picture once, and training opens none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_kit.data.bucket_places import Places
from lora_kit.data.buckets import Size
from lora_kit.data.samples import Latent
from lora_kit.data.scan import View, check_pictures, scan_pictures
from lora_kit.data.training_set import TrainingSet
from lora_kit.errors import ModelError
from lora_kit.progress import ProgressBar, progress

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
_HELD_BATCHES = 4


class _Latents(NamedTuple):
    """Of one version of all pictures of one size, in the places' order; float32 on the CPU."""

    mean: Tensor
    """[n, c, h, w]."""
    std: Tensor
    masks: dict[int, Tensor]
    """Row → [h, w], of those that have one."""


class MemoryLatents:
    """The latents of all places of a training set."""

    in_memory = True

    def __init__(self, places: Places, versions: Sequence[dict[Size, _Latents]]) -> None:
        """Versions: those of the pictures and, where pictures are flipped, of their mirror images."""
        self.places = places
        self.versions = versions

    def read(self, place: int, mirrored: bool = False) -> Latent:
        """The latent at a place."""
        row = int(self.places.row[place])
        found = self.versions[mirrored][self.places.size(place)]
        return Latent(found.mean[row], found.std[row], found.masks.get(row))


def cache_latents(training_set: TrainingSet, encode: Encode, micro_batch: int, bar: ProgressBar = progress) -> None:
    """Encode every picture once, and its mirror image if `flip` is on; afterwards samples carry latents.

    encode: pixels [b, 3, H, W] in -1..1 → (mean, std), each [b, c, h, w], of at most `micro_batch` pictures, all of one
    size.
    Memory: 8 bytes a latent value, so 128 KiB a picture at 512 px, twice that with `flip`.

    Where the section does not ask for a cache, or crops at random, the pictures are only checked. Broken ones
    are handled as `check_pictures` does. Raises ModelError if the VAE returns values that are not finite.
    """
    if not training_set.cacheable:
        check_pictures(training_set, bar)
        return
    if training_set.latents is not None:
        return
    encoder = _Encoder(training_set, encode, micro_batch)
    scan_pictures(training_set, bar, "Encoding pictures", encoder.add)
    training_set.latents = MemoryLatents(training_set.places, encoder.finish())


class _Encoder:
    """Collects pictures by size and encodes them a micro-batch at a time, into tensors laid out at the first one."""

    def __init__(self, training_set: TrainingSet, encode: Encode, micro_batch: int):
        self.encode = encode
        self.micro_batch = micro_batch
        self.ids = [record.id for record in training_set.records]
        self.versions = 2 if training_set.section.flip else 1
        places = training_set.places
        self.room = dict(zip(places.sizes, np.bincount(places.bucket).tolist(), strict=True))
        """Places of each size."""
        self.waiting: defaultdict[Size, list[tuple[int, View]]] = defaultdict(list)
        self.stores: list[dict[Size, _Latents]] = [{} for _ in range(self.versions)]
        self.done: dict[Size, int] = dict.fromkeys(places.sizes, 0)

    def add(self, record: int, views: Sequence[View]) -> None:
        for each in views:
            size = (each.pixels.shape[2], each.pixels.shape[1])
            self.waiting[size].append((record, each))
            if len(self.waiting[size]) == self.micro_batch:
                self._flush(size)
            # Many sizes must not hold many pictures: the fullest goes as it is.
            if sum(map(len, self.waiting.values())) >= _HELD_BATCHES * self.micro_batch:
                self._flush(max(self.waiting, key=lambda size: len(self.waiting[size])))

    def finish(self) -> list[dict[Size, _Latents]]:
        """Latents of the pictures that were added, in order for each size, and of their mirror images."""
        for size in list(self.waiting):
            self._flush(size)
        for stores in self.stores:
            for size, store in stores.items():
                stores[size] = store if self.done[size] == self.room[size] else _first(store, self.done[size])
        return self.stores

    def _flush(self, size: Size) -> None:
        waiting = self.waiting.pop(size)
        pixels = torch.stack([view.pixels for _, view in waiting])
        rows = slice(self.done[size], self.done[size] + len(waiting))
        for version, stores in enumerate(self.stores):
            mean, std = self._encode(pixels.flip(-1) if version else pixels, [record for record, _ in waiting])
            if size not in stores:
                shape = (self.room[size], *mean.shape[1:])
                stores[size] = _Latents(torch.empty(shape), torch.empty(shape), {})
            stores[size].mean[rows], stores[size].std[rows] = mean, std
            masks = {rows.start + row: view.mask for row, (_, view) in enumerate(waiting) if view.mask is not None}
            stores[size].masks.update({row: mask.flip(-1) if version else mask for row, mask in masks.items()})
        self.done[size] = rows.stop

    def _encode(self, pixels: Tensor, records: Sequence[int]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean, std = (part.to("cpu", torch.float32) for part in self.encode(pixels))
        finite = torch.isfinite(mean) & torch.isfinite(std)
        bad = [self.ids[record] for record, ok in zip(records, finite.flatten(1).all(1), strict=True) if not ok]
        if bad:
            raise ModelError(f"The VAE gives latents that are not finite for {', '.join(bad)}. Hold the VAE in fp32.")
        return mean, std


def _first(store: _Latents, count: int) -> _Latents:
    """A copy without the unused end, whose memory is given back."""
    return _Latents(store.mean[:count].clone(), store.std[:count].clone(), store.masks)
