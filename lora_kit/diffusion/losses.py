"""The distance between prediction and target, element by element; each sample's threshold where a loss has one.

`huber` and `smooth_l1` are the pseudo-Huber losses of sd-scripts (library/train_util.py, `conditional_loss`), after
Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LOSSES = ("l2", "l1", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")


def l2(difference: Tensor) -> Tensor:
    """e²."""
    return difference.square()


def l1(difference: Tensor) -> Tensor:
    """|e|."""
    return difference.abs()


def smooth_l1(difference: Tensor, threshold: Tensor) -> Tensor:
    """2 (√(e² + c²) - c): near 2 |e| where |e| ≫ c, near e² / c where |e| ≪ c.

    difference e: [b, …]; threshold c: [b], above 0. Computed as 2 e² / (√(e² + c²) + c), the same number without the
    difference of two nearly equal ones.
    """
    c = threshold.view(-1, *(1 for _ in difference.shape[1:]))
    squares = difference.square()
    return 2 * squares / ((squares + c.square()).sqrt() + c)


def huber(difference: Tensor, threshold: Tensor) -> Tensor:
    """c times `smooth_l1`: near e² where |e| ≪ c, near 2 c |e| where |e| ≫ c."""
    c = threshold.view(-1, *(1 for _ in difference.shape[1:]))
    return c * smooth_l1(difference, threshold)


def elementwise_loss(loss: str, difference: Tensor, threshold: Tensor | None) -> Tensor:
    """The loss of that name, in the difference's shape. threshold: [b], for `huber` and `smooth_l1`."""
    if threshold is None:
        plain: dict[str, Callable[[Tensor], Tensor]] = {"l2": l2, "l1": l1}
        return plain[loss](difference)
    smooth: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"huber": huber, "smooth_l1": smooth_l1}
    return smooth[loss](difference, threshold)


def constant_thresholds(c: float, alpha_bars: Tensor) -> Tensor:
    """c at every timestep; alpha_bars: [T]."""
    return torch.full_like(alpha_bars, c)


def exponential_thresholds(c: float, alpha_bars: Tensor) -> Tensor:
    """c^(t / T): 1 at t = 0, falling to c at the end (Khrapov et al. 2024, the exponential schedule)."""
    count = len(alpha_bars)
    return c ** (torch.arange(count, dtype=alpha_bars.dtype) / count)


def snr_thresholds(c: float, alpha_bars: Tensor) -> Tensor:
    """(1 - c) / (1 + σ)² + c with σ = √((1 - ᾱ) / ᾱ) (Khrapov et al. 2024, the SNR schedule).

    Near 1 where there is little noise, c where SNR = 0.
    """
    return (1 - c) / (1 + ((1 - alpha_bars) / alpha_bars).sqrt()).square() + c


def thresholds(schedule: str, c: float, alpha_bars: Tensor) -> Tensor:
    """The pseudo-Huber threshold of every timestep by the schedule of that name; [T]."""
    functions = {"constant": constant_thresholds, "exponential": exponential_thresholds, "snr": snr_thresholds}
    return functions[schedule](c, alpha_bars)
