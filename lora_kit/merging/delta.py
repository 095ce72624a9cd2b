"""What adapters add to a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters import LoraUpdate


class ScaledUpdate(NamedTuple):
    """One adapter's update of one module, and the strength it is wanted at."""

    update: LoraUpdate
    scale: float

    @property
    def factor(self) -> float:
        """scale · alpha / rank."""
        return self.scale * self.update.alpha / self.update.down.shape[0]


def total_delta(updates: Sequence[ScaledUpdate], dtype: torch.dtype = torch.float32) -> Tensor:
    """ΔW = Σ scale · (alpha / rank) · up · down, computed and returned in `dtype`: [out, in] or [out, in, kh, kw].

    All adapters in one product, their ranks side by side, so that the weight is touched once.
    """
    first = updates[0].update
    up = torch.cat([one.factor * one.update.up.to(dtype).flatten(1) for one in updates], dim=1)
    down = torch.cat([one.update.down.to(dtype).flatten(1) for one in updates])
    return (up @ down).reshape(first.up.shape[0], *first.down.shape[1:])


def total_magnitude(updates: Sequence[ScaledUpdate]) -> Tensor:
    """Σ |scale · alpha / rank| · |up| · |down| in float64: what rounding errors of ΔW are measured against."""
    absolute = [
        ScaledUpdate(LoraUpdate(one.update.down.abs(), one.update.up.abs(), abs(one.update.alpha)), abs(one.scale))
        for one in updates
    ]
    return total_delta(absolute, torch.float64)
