"""One training example, what is kept of pictures once they are encoded, and how examples become a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_kit.data.batch import Batch


class Sample(NamedTuple):
    """One training example; `Batch` says what the fields are."""

    id: str
    position: int
    """Index within the optimizer step."""
    caption: str
    pixels: Tensor | None
    """float32 [3, H, W]; None where the latent is kept and nothing else needs them."""
    latent_mean: Tensor | None
    latent_std: Tensor | None
    mask: Tensor | None = None
    """float32 [h, w]; None: everything counts."""
    step_samples: int = 1
    loss_weight: float = 1.0
    from_base: bool = False
    hole: Tensor | None = None
    """float32 [1, H, W]; None: no mask that says what is to be filled."""


class Latent(NamedTuple):
    """What is kept of one view of a picture, on the CPU."""

    mean: Tensor
    """float32 [c, h, w], unscaled, as `std`."""
    std: Tensor
    mask: Tensor | None
    """float32 [h, w] in 0..1, if the picture has one."""


class KeptLatents(Protocol):
    """Latents of every place of a training set."""

    in_memory: bool
    """Reading takes no time, so that it needs no workers."""

    def read(self, place: int, mirrored: bool = False) -> Latent | None:
        """The latent at a place, or None if it is lost and must be made from the picture again."""
        ...


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one step and one size → a micro-batch."""
    return Batch(
        ids=[sample.id for sample in samples],
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        captions=[sample.caption for sample in samples],
        pixels=_stack([sample.pixels for sample in samples]),
        latent_mean=_stack([sample.latent_mean for sample in samples]),
        latent_std=_stack([sample.latent_std for sample in samples]),
        is_latent=torch.tensor([sample.latent_mean is not None for sample in samples]),
        masks=_masks([sample.mask for sample in samples]),
        loss_weights=torch.tensor([sample.loss_weight for sample in samples], dtype=torch.float32),
        from_base=[row for row, sample in enumerate(samples) if sample.from_base],
        step_samples=samples[0].step_samples,
        holes=[sample.hole for sample in samples] if any(sample.hole is not None for sample in samples) else (),
    )


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    return torch.stack([torch.ones_like(present[0]) if mask is None else mask for mask in masks])
