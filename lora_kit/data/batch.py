"""What the loader hands to the training step."""

from __future__ import annotations

from collections.abc import Sequence
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
    """float32 [p, 3, height, width] in -1..1, of the p samples whose latents are not kept; None if p = 0. Where the
    model's family needs the pictures themselves: of all b samples."""
    latent_mean: Tensor | None
    """float32 [b - p, c, h, w] of the VAE's posterior, unscaled, of the others; None if there are none."""
    latent_std: Tensor | None
    """float32 [b - p, c, h, w], as latent_mean."""
    is_latent: Tensor
    """bool [b]: which samples are in `latent_mean`, in order; the others are to be encoded. Usually all or none: an
    entry of the cache may be damaged."""
    masks: Tensor | None
    """float32 [b, h, w] in 0..1, what each cell of a latent counts in the loss; None if no sample has a mask."""
    loss_weights: Tensor
    """float32 [b]: factor of each sample's loss."""
    from_base: list[int]
    """The samples whose target is the base model's own prediction."""
    step_samples: int
    """Samples of the optimizer step, over all micro-batches and processes: the loss of each counts 1 / this."""
    holes: Sequence[Tensor | None] = ()
    """Of each sample, float32 [1, height, width] in 0..1: what its mask file says is to be filled. None: it has no
    mask. Empty where masks weigh the loss."""

    @property
    def unencoded(self) -> Tensor | None:
        """Of `pixels`, those of the samples whose latents are not kept; None if all are."""
        kept = 0 if self.latent_mean is None else len(self.latent_mean)
        if self.pixels is None or kept == len(self.is_latent):
            return None
        return self.pixels[~self.is_latent] if len(self.pixels) == len(self.is_latent) and kept else self.pixels
