"""Random draws that derive from (seed, step, sample).

Every number is drawn on the CPU from a generator of its own, so it is the same on every device, in every
process, however a batch is cut into micro-batches, and after a resume: no generator state is ever saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Draws(NamedTuple):
    """The randomness of b samples."""

    noise: Tensor
    """ε, float32 [b, c, h, w]."""
    posterior_noise: Tensor
    """For the sample of the VAE's posterior, float32 [b, c, h, w]."""
    timesteps: Tensor
    """int64 [b], uniform over 0 … T-1."""


def seed_for(*words: int | str) -> int:
    """63 bits that depend on every word, stable over versions and machines."""
    digest = hashlib.blake2b("\x1f".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(*words: int | str) -> torch.Generator:
    """A CPU generator seeded by `seed_for(*words)`."""
    return torch.Generator().manual_seed(seed_for(*words))


def draw_for_samples(
    seed: int, step: int, positions: Sequence[int], shape: Sequence[int], timesteps: int, noise_offset: float = 0.0
) -> Draws:
    """The draws of the samples at `positions` of optimizer step `step`; `shape` is a latent's [c, h, w].

    With `noise_offset` the noise gets a constant per channel of that deviation (Guttenberg 2023,
    "Diffusion with offset noise").
    """
    noises, posteriors, times = [], [], []
    for position in positions:
        generator = generator_for(seed, "sample", step, position)
        times.append(torch.randint(timesteps, (), generator=generator))
        noise = torch.randn(*shape, generator=generator)
        posteriors.append(torch.randn(*shape, generator=generator))
        if noise_offset:
            noise = noise + noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
        noises.append(noise)
    return Draws(torch.stack(noises), torch.stack(posteriors), torch.stack(times))


def stratified_timesteps(count: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """int64 [count]: one uniform draw in each of `count` equal parts of 0 … timesteps-1."""
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (places * timesteps).long().clamp(max=timesteps - 1)
