"""What adapters add to a weight.

Several adapters on one module add up, and each that depends on the module's weight sees the original one: the sum
does not depend on their order, and is what LyCORIS's live networks do (`modules/base.py`, `_current_weight`).
LyCORIS's `merge_to`, called for one after the other, would instead show the second what the first has made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters.updates import LoraUpdate, Update
from lora_kit.adapters.updates.base import FP32_ROUNDING


class ScaledUpdate(NamedTuple):
    """One adapter's update of one module, and the strength it is wanted at."""

    update: Update
    scale: float


def total_delta(
    updates: Sequence[ScaledUpdate], dtype: torch.dtype = torch.float32, weight: Tensor | None = None
) -> Tensor | None:
    """Σ ΔW at their scales, computed and returned in `dtype`: the weight's shape; None if no update changes it.

    Plain LoRA go in one product, their ranks side by side, so that the weight is touched once. `weight` is the
    original one; it must be given if an update needs it.
    """
    plain = [one for one in updates if _is_pair(one.update)]
    found = [_pairs(plain, dtype)] if plain else []
    for one in updates:
        delta = None if _is_pair(one.update) else one.update.weight_delta(one.scale, weight, dtype)
        found += [] if delta is None else [delta]
    if not found:
        return None
    total = found[0]
    for delta in found[1:]:
        total = total + delta.reshape(total.shape)
    return total


def total_bias_delta(
    updates: Sequence[ScaledUpdate], dtype: torch.dtype = torch.float32, bias: Tensor | None = None
) -> Tensor | None:
    """Σ Δbias at their scales in `dtype`, [out]; None if no update changes the bias."""
    found = [one.update.bias_delta(one.scale, bias, dtype) for one in updates]
    changes = [delta for delta in found if delta is not None]
    return torch.stack(changes).sum(0) if changes else None


def rounding_bound(updates: Sequence[ScaledUpdate], weight: Tensor) -> Tensor:
    """How far `weight + total_delta(…)` in fp32 may be from its exact value, in float64 and the weight's shape.

    With u = 2^-24: R summed ranks of the plain LoRA cost (R + 3) · u · Σ|s·up|·|down| (Higham, Accuracy and Stability
    of Numerical Algorithms, section 3.1); the others their own `rounding`; and each addition u of what is added.
    """
    exact = weight.double()
    plain = [one for one in updates if _is_pair(one.update)]
    size = exact.abs()
    bound = torch.zeros_like(size)
    if plain:
        magnitude = total_magnitude(plain).reshape(size.shape)
        bound += (sum(_rank(one.update) for one in plain) + 3) * FP32_ROUNDING * magnitude
        size = size + magnitude
    for one in updates:
        delta = None if _is_pair(one.update) else one.update.weight_delta(one.scale, exact, torch.float64)
        if delta is not None:
            bound += one.update.rounding(one.scale, exact).reshape(size.shape)
            size = size + delta.abs().reshape(size.shape)
    additions = len(updates) + 1
    return bound * (1 + additions * FP32_ROUNDING) + additions * FP32_ROUNDING * size


def total_magnitude(updates: Sequence[ScaledUpdate]) -> Tensor:
    """Σ |scale · alpha / rank| · |up| · |down| of plain LoRA in float64: what their rounding is measured against."""
    absolute = [ScaledUpdate(_absolute(one.update), abs(one.scale)) for one in updates]
    return _pairs(absolute, torch.float64)


def _is_pair(update: Update) -> bool:
    return isinstance(update, LoraUpdate) and update.mid is None and update.magnitude is None


def _rank(update: Update) -> int:
    return update.rank or 0


def _absolute(update: Update) -> LoraUpdate:
    assert isinstance(update, LoraUpdate)
    return LoraUpdate(update.down.double().abs(), update.up.double().abs(), abs(update.alpha))


def _pairs(updates: Sequence[ScaledUpdate], dtype: torch.dtype) -> Tensor:
    pairs = [(one.update, one.scale) for one in updates if isinstance(one.update, LoraUpdate)]
    up = torch.cat([u.up.to(dtype).flatten(1) * (scale * u.alpha / u.rank) for u, scale in pairs], dim=1)
    down = torch.cat([u.down.to(dtype).flatten(1) for u, _ in pairs])
    return (up @ down).reshape(pairs[0][0].up.shape[0], *pairs[0][0].down.shape[1:])
