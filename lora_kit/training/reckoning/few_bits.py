"""A quantised layer as far as memory goes: its whole weight is there for the moment of a product, forward and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_kit.adapters.layers import base_layer
from lora_kit.adapters.places import module_at
from lora_kit.models.quantise import FewBitsLinear
from lora_kit.targeting.quantised import Quantised


class FakeFewBits(FewBitsLinear):
    """Its weight, which is a plain one, stands for the dequantised one."""

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[out, in]."""
        return self.weight.to(dtype, copy=True)


def hold_in_few_bits(components: Mapping[str, nn.Module], plan: Quantised) -> None:
    """Let the plan's layers behave as quantised ones."""
    for module in plan.modules:
        base_layer(module_at(components, module.name)).__class__ = FakeFewBits
