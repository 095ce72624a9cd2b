"""A quantised layer as far as memory goes: its whole weight is there for the moment of a product, forward and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_kit.adapters.layers import base_layer
from lora_kit.adapters.places import module_at
from lora_kit.targeting.quantised import Quantised


class FewBits(nn.Linear):
    """A frozen linear layer whose weight stands for a dequantised one. Of a class of its own, so that an adapter's
    layer over it computes as it does over bitsandbytes'."""

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        made: Tensor = _Product.apply(input, self.weight)
        return made if self.bias is None else made + self.bias  # pyright: ignore[reportUnnecessaryComparison]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, weight.to(x.dtype, copy=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return dy @ weight.to(dy.dtype, copy=True), None


def hold_in_few_bits(components: Mapping[str, nn.Module], plan: Quantised) -> None:
    """Let the plan's layers behave as quantised ones."""
    for module in plan.modules:
        base_layer(module_at(components, module.name)).__class__ = FewBits
