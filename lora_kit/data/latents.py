"""Latents in memory: the VAE sees each picture once, and training opens none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_kit.data.scan import check_pictures, scan_pictures
from lora_kit.data.training_set import Latents, TrainingSet
from lora_kit.errors import ModelError
from lora_kit.progress import ProgressBar, progress

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


def cache_latents(training_set: TrainingSet, encode: Encode, micro_batch: int, bar: ProgressBar = progress) -> None:
    """Encode every picture once, and its mirror image if `flip` is on; afterwards samples carry latents.

    encode: pixels [b, 3, H, W] in -1..1 → (mean, std), each [b, c, h, w], of at most `micro_batch` pictures.
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
    """Collects pictures, encodes them a micro-batch at a time into tensors laid out at the first one."""

    def __init__(self, training_set: TrainingSet, encode: Encode, micro_batch: int):
        self.encode = encode
        self.micro_batch = micro_batch
        self.ids = [record.id for record in training_set.records]
        self.versions = 2 if training_set.section.flip else 1
        self.waiting: list[tuple[int, Tensor]] = []
        self.stores: list[Latents] = []
        self.done = 0

    def add(self, record: int, pixels: Tensor) -> None:
        self.waiting.append((record, pixels))
        if len(self.waiting) == self.micro_batch:
            self._flush()

    def finish(self) -> tuple[Latents, Latents | None]:
        """Latents of the pictures that were added, in order, and of their mirror images."""
        if self.waiting:
            self._flush()
        stores = [store if self.done == len(self.ids) else _first(store, self.done) for store in self.stores]
        return stores[0], (stores[1] if self.versions == 2 else None)

    def _flush(self) -> None:
        pixels = torch.stack([pixels for _, pixels in self.waiting])
        rows = slice(self.done, self.done + len(self.waiting))
        for version in range(self.versions):
            latents = self._encode(pixels.flip(-1) if version else pixels)
            if len(self.stores) == version:
                shape = (len(self.ids), *latents.mean.shape[1:])
                self.stores.append(Latents(torch.empty(shape), torch.empty(shape)))
            self.stores[version].mean[rows] = latents.mean
            self.stores[version].std[rows] = latents.std
        self.done = rows.stop
        self.waiting.clear()

    def _encode(self, pixels: Tensor) -> Latents:
        with torch.no_grad():
            latents = Latents(*(part.to("cpu", torch.float32) for part in self.encode(pixels)))
        finite = torch.isfinite(latents.mean) & torch.isfinite(latents.std)
        bad = [
            self.ids[record] for (record, _), ok in zip(self.waiting, finite.flatten(1).all(1), strict=True) if not ok
        ]
        if bad:
            raise ModelError(f"The VAE gives latents that are not finite for {', '.join(bad)}. Hold the VAE in fp32.")
        return latents


def _first(store: Latents, count: int) -> Latents:
    """A copy without the unused end, whose memory is given back."""
    return Latents(store.mean[:count].clone(), store.std[:count].clone())
