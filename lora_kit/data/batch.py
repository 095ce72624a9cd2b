"""What the loader hands to the training step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """A micro-batch of b samples. A NamedTuple: Accelerate moves it, it silently leaves dataclasses behind."""

    ids: list[str]
    """Where each sample comes from, for messages: `folder/file.png`."""
    positions: Tensor
    """int64 [b]: index of each sample within the optimizer step, over all micro-batches and processes.
    Noise and timesteps derive from (seed, step, position)."""
    captions: list[str]
    pixels: Tensor | None
    """float32 [b, 3, height, width] in -1..1, unless the latents are cached."""
    latent_mean: Tensor | None
    """float32 [b, c, h, w] of the VAE's posterior, unscaled, if cached."""
    latent_std: Tensor | None
    """float32 [b, c, h, w], as latent_mean."""
    step_samples: int
    """Samples of the optimizer step, over all micro-batches and processes: the loss of each counts 1 / this."""
