"""One training example, what is kept of pictures once they are encoded, and how examples become a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    """float32 [3, H, W]."""
    latent_mean: Tensor | None
    latent_std: Tensor | None
    step_samples: int = 1


class Latents(NamedTuple):
    """Posterior means and deviations of one version of all pictures of one size, float32 [n, c, h, w] on the CPU."""

    mean: Tensor
    std: Tensor


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one step, equal in kind (all pixels or all latents) and size → one micro-batch."""
    return Batch(
        ids=[sample.id for sample in samples],
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        captions=[sample.caption for sample in samples],
        pixels=_stack([sample.pixels for sample in samples]),
        latent_mean=_stack([sample.latent_mean for sample in samples]),
        latent_std=_stack([sample.latent_std for sample in samples]),
        step_samples=samples[0].step_samples,
    )


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None
