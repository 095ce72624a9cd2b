"""Which timesteps are trained: distributions as quantile functions, so that strata are parts of 0..1.

A quantile function maps u, uniform over 0..1, to a place x in 0..1 on the way from the least noise (0) to the most (1).
u, x: float64 [b].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """x = 1 / (1 + exp(-(m + s Φ⁻¹(u)))): its logit is normal (Esser et al. 2024, section 3.1)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, scale: float) -> Tensor:
    """Mode sampling with heavy tails (Esser et al. 2024, section 3.1), rising in u: x = u - s (sin²(π u / 2) - u).

    Their f(u; s) = 1 - u - s (cos²(π u / 2) - 1 + u) at 1 - u. More of the middle for s above 0, more of the ends
    below; -1 ≤ s ≤ 2 / (π - 2) keeps it monotone.
    """
    return u - scale * ((torch.pi * u / 2).sin().square() - u)


def cubic(u: Tensor) -> Tensor:
    """x = 1 - (1 - u)³: mostly noisy timesteps, density (1 - x)^(-2/3) / 3.

    diffusers' examples/t2i_adapter/train_t2i_adapter_sdxl.py, where it is 1 - r³ of a uniform r.
    """
    return 1 - (1 - u) ** 3


def band(u: Tensor, start: float, stop: float, factor: float) -> Tensor:
    """Density `factor` times as high between `start` and `stop` as elsewhere: piecewise linear.

    SimpleTuner's and diffusers' `timestep_bias_strategy`: `later` is the band up to 1, `earlier` the one from 0.
    """
    mass = 1 + (factor - 1) * (stop - start)
    low, high = start / mass, (start + factor * (stop - start)) / mass
    inside = start + (u - low) * mass / factor
    after = stop + (u - high) * mass
    return torch.where(u < low, u * mass, torch.where(u < high, inside, after))


def timesteps_at(x: Tensor, first: int, last: int) -> Tensor:
    """Places in 0..1 as int64 timesteps `first` … `last`, each one's part of 0..1 equally long."""
    count = last - first + 1
    return first + (x * count).long().clamp(0, count - 1)


def places_in_strata(u: Tensor, order: Tensor, positions: Sequence[int]) -> Tensor:
    """u of the samples at `positions`, each moved into its own of n equal parts of 0..1: (stratum + u) / n.

    order: int64 [n], which part each of the step's n samples has, as `strata_of_step` draws it.
    """
    return (order[list(positions)] + u) / len(order)
