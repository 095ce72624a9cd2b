"""One PEFT layer: how it is built over a module, and which adapters in it are active."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from torch import Tensor, nn

from lora_kit.targeting import Target, canonical_name


def with_adapter(module: nn.Module, target: Target, adapter_name: str, seed: int) -> nn.Module:
    """The PEFT layer over `module` (or `module` itself if it is one) with an active new adapter in fp32."""
    config = LoraConfig(
        r=target.rank,
        lora_alpha=cast("int", target.alpha),  # PEFT only divides by the rank, so fractions are exact too
        lora_dropout=target.dropout,
        init_lora_weights=False,
    )
    was_active = module.active_adapters if isinstance(module, LoraLayer) else []
    with torch.device("meta"):  # PEFT's own draw is neither paid for nor taken from the global generator
        layer = _layer(module, config, adapter_name)
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear | nn.Conv2d), f"{target.module.name} is a {type(base).__name__}"
    down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    down.weight, up.weight = _factors(down, up, base.weight.device, f"{seed}:{canonical_name(target.module.name)}")
    layer.train(base.training)
    activate(layer, [*was_active, adapter_name])
    return layer


def activate(layer: LoraLayer, names: Sequence[str]) -> None:
    """PEFT's `set_adapter` without its side effect of freezing inactive adapters and thawing active ones."""
    flags = [(weight, weight.requires_grad) for weight in cast("nn.Module", layer).parameters()]
    layer.set_adapter(list(names))
    for weight, flag in flags:
        weight.requires_grad_(flag)


def base_layer(module: nn.Module) -> nn.Module:
    """The network's own module, whether or not a PEFT layer is over it."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _layer(module: nn.Module, config: LoraConfig, adapter_name: str) -> Linear | Conv2d:
    rank, alpha = config.r, config.lora_alpha
    if isinstance(module, Linear | Conv2d):
        module.update_layer(adapter_name, rank, alpha, config=config)  # pyright: ignore[reportUnknownMemberType] - PEFT
        return module
    wrapper = Linear if isinstance(module, nn.Linear) else Conv2d
    return wrapper(module, adapter_name, config=config, r=rank, lora_alpha=alpha)


def _factors(down: nn.Module, up: nn.Module, device: torch.device, key: str) -> tuple[nn.Parameter, nn.Parameter]:
    """fp32 [down, up]: down Kaiming-uniform with a = √5 (PEFT's), up zero.

    Drawn on the CPU from a seed of its own, so that it depends on neither order, device, process nor neighbours.
    """
    assert isinstance(down.weight, Tensor)
    assert isinstance(up.weight, Tensor)
    drawn = torch.empty(down.weight.shape, dtype=torch.float32)
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    zero = torch.zeros(up.weight.shape, dtype=torch.float32, device=device)
    return nn.Parameter(drawn.to(device)), nn.Parameter(zero)
