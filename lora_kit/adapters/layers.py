"""The layers over one module: how a PEFT layer is built, which adapters in it are active, and what lies under it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from torch import Tensor, nn

from lora_kit.adapters.delta_layer import DeltaLayer
from lora_kit.adapters.dropouts import add_dropouts
from lora_kit.adapters.inits import initial_pair
from lora_kit.adapters.joined import JoinedConv2d, JoinedLinear
from lora_kit.targeting import Target, canonical_name


class LiveLayer(NamedTuple):
    """An adapted module: PEFT's layer over a DeltaLayer over the network's own module; either may be missing."""

    lora: LoraLayer | None
    delta: DeltaLayer | None
    base: nn.Module

    @property
    def adapters(self) -> list[str]:
        """The adapters that change this module."""
        names = [*(self.lora.lora_A if self.lora else ()), *(self.delta.updates if self.delta else ())]
        return list(dict.fromkeys(names))


def live_layers(components: Mapping[str, nn.Module]) -> dict[str, LiveLayer]:
    """Every adapted module by dotted name, in module order."""
    return {
        f"{component}.{inner}": live_layer(cast(nn.Module, module))
        for component, network in components.items()
        for inner, module in network.named_modules()
        if isinstance(module, LoraLayer | DeltaLayer) and not inner.endswith(".base_layer")
    }


def live_layer(top: nn.Module) -> LiveLayer:
    """What stands in a module's place, taken apart."""
    lora = top if isinstance(top, LoraLayer) else None
    under = lora.base_layer if lora else top
    return LiveLayer(lora, under if isinstance(under, DeltaLayer) else None, base_layer(top))


def stacked(lora: LoraLayer | None, delta: DeltaLayer | None, base: nn.Module) -> nn.Module:
    """The layers, put on each other anew; the module that stands in the network."""
    if delta is not None:
        delta.base_layer = base
    under = delta or base
    if lora is None:
        return under
    lora.base_layer = under
    return cast("nn.Module", lora)


def with_adapter(module: nn.Module, target: Target, adapter_name: str, seed: int) -> nn.Module:
    """The PEFT layer over `module` (or `module` itself if it is one) with an active new adapter in fp32."""
    config = LoraConfig(
        r=target.rank,
        lora_alpha=cast("int", target.effective_alpha),  # PEFT only divides by the rank, so fractions are exact too
        lora_dropout=target.dropout,
        init_lora_weights=False,
    )
    was_active = module.active_adapters if isinstance(module, LoraLayer) else []
    with torch.device("meta"):  # PEFT's own draw is neither paid for nor taken from the global generator
        layer = _layer(module, config, adapter_name)
    base = base_layer(layer)
    assert isinstance(base, nn.Linear | nn.Conv2d), f"{target.module.name} is a {type(base).__name__}"
    down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    down.weight, up.weight = _factors(down, up, base.weight, target, seed)
    add_dropouts(down, up, target.rank_dropout, target.module_dropout)
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
    """The network's own module, whatever layers are over it."""
    while isinstance(module, LoraLayer | DeltaLayer):
        module = module.base_layer
    return module


def _layer(module: nn.Module, config: LoraConfig, adapter_name: str) -> Linear | Conv2d:
    rank, alpha = config.r, config.lora_alpha
    if isinstance(module, Linear | Conv2d):
        module.update_layer(adapter_name, rank, alpha, config=config)  # pyright: ignore[reportUnknownMemberType] - PEFT
        return module
    base = base_layer(module)
    wrapper = JoinedLinear if isinstance(base, nn.Linear) else JoinedConv2d
    layer = wrapper(base, adapter_name, config=config, r=rank, lora_alpha=alpha)
    layer.base_layer = module  # a DeltaLayer, it may be: PEFT reads the shapes off the network's own module
    return layer


def _factors(down: nn.Module, up: nn.Module, weight: Tensor, target: Target, seed: int) -> tuple[nn.Parameter, ...]:
    """fp32 [down, up] as `target.init` says, on the weight's device."""
    assert isinstance(down.weight, Tensor)
    assert isinstance(up.weight, Tensor)
    key = f"{seed}:{canonical_name(target.module.name)}"
    pair = initial_pair(target.init, target.rank, weight, target.effective_alpha / target.rank, key)
    made = (pair.down.reshape(down.weight.shape), pair.up.reshape(up.weight.shape))
    # A convolution's first factor lies as its products want it (lora_kit/adapters/joined_functions.py).
    layout = torch.channels_last if weight.ndim == 4 else torch.preserve_format
    return tuple(nn.Parameter(factor.to(weight.device, memory_format=layout)) for factor in made)
