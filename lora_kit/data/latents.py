"""Latents in memory: the VAE sees each picture once, and training opens none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lora_kit.data.buckets import Size
from lora_kit.data.samples import Latents
from lora_kit.data.scan import check_pictures, scan_pictures
from lora_kit.data.training_set import TrainingSet
from lora_kit.errors import ModelError
from lora_kit.progress import ProgressBar, progress

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
_HELD_BATCHES = 4


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
    training_set.latents, training_set.mirrored = encoder.finish()


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
        self.waiting: defaultdict[Size, list[tuple[int, Tensor]]] = defaultdict(list)
        self.stores: list[dict[Size, Latents]] = [{} for _ in range(self.versions)]
        self.done: dict[Size, int] = dict.fromkeys(places.sizes, 0)

    def add(self, record: int, pixels: Sequence[Tensor]) -> None:
        for each in pixels:
            size = (each.shape[2], each.shape[1])
            self.waiting[size].append((record, each))
            if len(self.waiting[size]) == self.micro_batch:
                self._flush(size)
            # Many sizes must not hold many pictures: the fullest goes as it is.
            if sum(map(len, self.waiting.values())) >= _HELD_BATCHES * self.micro_batch:
                self._flush(max(self.waiting, key=lambda size: len(self.waiting[size])))

    def finish(self) -> tuple[dict[Size, Latents], dict[Size, Latents] | None]:
        """Latents of the pictures that were added, in order for each size, and of their mirror images."""
        for size in list(self.waiting):
            self._flush(size)
        for stores in self.stores:
            for size, store in stores.items():
                stores[size] = store if self.done[size] == self.room[size] else _first(store, self.done[size])
        return self.stores[0], (self.stores[1] if self.versions == 2 else None)

    def _flush(self, size: Size) -> None:
        waiting = self.waiting.pop(size)
        pixels = torch.stack([pixels for _, pixels in waiting])
        rows = slice(self.done[size], self.done[size] + len(waiting))
        for version, stores in enumerate(self.stores):
            latents = self._encode(pixels.flip(-1) if version else pixels, [record for record, _ in waiting])
            if size not in stores:
                shape = (self.room[size], *latents.mean.shape[1:])
                stores[size] = Latents(torch.empty(shape), torch.empty(shape))
            stores[size].mean[rows] = latents.mean
            stores[size].std[rows] = latents.std
        self.done[size] = rows.stop

    def _encode(self, pixels: Tensor, records: Sequence[int]) -> Latents:
        with torch.no_grad():
            latents = Latents(*(part.to("cpu", torch.float32) for part in self.encode(pixels)))
        finite = torch.isfinite(latents.mean) & torch.isfinite(latents.std)
        bad = [self.ids[record] for record, ok in zip(records, finite.flatten(1).all(1), strict=True) if not ok]
        if bad:
            raise ModelError(f"The VAE gives latents that are not finite for {', '.join(bad)}. Hold the VAE in fp32.")
        return latents


def _first(store: Latents, count: int) -> Latents:
    """A copy without the unused end, whose memory is given back."""
    return Latents(store.mean[:count].clone(), store.std[:count].clone())
