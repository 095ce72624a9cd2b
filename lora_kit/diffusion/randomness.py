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

from lora_kit.diffusion.noises import offset_noise, pyramid_noise


class PyramidShape(NamedTuple):
    """Of multi-resolution noise."""

    levels: int
    discount: float
    """What each coarser level counts, to the power of the level."""


class Draws(NamedTuple):
    """The randomness of b samples."""

    noise: Tensor
    """ε, float32 [b, c, h, w]."""
    posterior_noise: Tensor
    """For the sample of the VAE's posterior, float32 [b, c, h, w]."""
    timesteps: Tensor
    """int64 [b], uniform over 0 … T-1."""
    offsets: Tensor | None = None
    """Constants of the noise offset, standard normal [b, c, 1, 1]; None where there is none to scale."""
    perturbation: Tensor | None = None
    """ξ of the input's perturbation, standard normal [b, c, h, w]; None without one."""


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
    "Diffusion with offset noise"). What is drawn after those three, and by the functions below, moves none of them.
    """
    noises, posteriors, times, offsets = [], [], [], []
    for position in positions:
        generator = generator_for(seed, "sample", step, position)
        times.append(torch.randint(timesteps, (), generator=generator))
        noise = torch.randn(*shape, generator=generator)
        posteriors.append(torch.randn(*shape, generator=generator))
        offsets.append(torch.randn(shape[0], 1, 1, generator=generator))
        noises.append(offset_noise(noise, offsets[-1], noise_offset) if noise_offset else noise)
    return Draws(torch.stack(noises), torch.stack(posteriors), torch.stack(times), torch.stack(offsets))


def uniforms_for_samples(seed: int, step: int, positions: Sequence[int]) -> Tensor:
    """Uniform over 0..1, float64 [b]: where in their distribution the samples' timesteps lie."""
    generators = [generator_for(seed, "timestep", step, position) for position in positions]
    return torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])


def strata_of_step(seed: int, step: int, count: int) -> Tensor:
    """Which of `count` strata each of a step's `count` samples has: a permutation, int64 [count].

    Drawn by step and number of samples alone, so that it is the same in every process and micro-batch. A permutation:
    what lies first in a batch would otherwise get little noise in every step.
    """
    return torch.randperm(count, generator=generator_for(seed, "strata", step))


def perturbation_for_samples(seed: int, step: int, positions: Sequence[int], shape: Sequence[int]) -> Tensor:
    """ξ of the input's perturbation, float32 [b, c, h, w]."""
    generators = [generator_for(seed, "perturbation", step, position) for position in positions]
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def pyramid_for_samples(noise: Tensor, seed: int, step: int, positions: Sequence[int], shape: PyramidShape) -> Tensor:
    """The samples' noise [b, c, h, w] as the finest level of their pyramids, `noises.pyramid_noise` of each."""
    generators = [generator_for(seed, "pyramid", step, position) for position in positions]
    return torch.stack([pyramid_noise(one, *shape, gen) for one, gen in zip(noise, generators, strict=True)])


def stratified_timesteps(count: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """int64 [count]: one uniform draw in each of `count` equal parts of 0 … timesteps-1."""
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (places * timesteps).long().clamp(max=timesteps - 1)
