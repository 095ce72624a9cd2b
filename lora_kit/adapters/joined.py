"""PEFT's LoRA layers with base and update computed as one operation.

PEFT adds the update to the base's output in three passes over it, copies the input into the factors' precision, and
autograd keeps that copy for each of q, k and v. Here the frozen layer and the two factors are one autograd function
(lora_kit/adapters/joined_functions.py). Parameters, names and numbers are PEFT's; whatever else a PEFT layer may be
asked for goes to PEFT's own forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn

from lora_kit.adapters.joined_columns import AdaptedColumns
from lora_kit.adapters.joined_functions import AdaptedConv, AdaptedLinear, FewBits
from lora_kit.arithmetic.few_places import has_few_places
from lora_kit.arithmetic.frozen_convolution import FrozenConv2d, window_of


class Plain(NamedTuple):
    """What one active adapter over a frozen layer is computed from."""

    weight: Tensor | FewBits
    bias: Tensor | None
    down: Tensor
    """[r, in, …], fp32 as a rule, whatever the base's precision."""
    up: Tensor
    """[out, r, …], likewise."""
    scale: float


class JoinedLinear(Linear):
    """PEFT's layer over an nn.Linear."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [..., in] → [..., out]."""
        plain = None if args or kwargs else _plain(self, (nn.Linear,))
        dtype = _common_dtype(x, plain)
        if plain is None or dtype is None:
            return super().forward(x, *args, **kwargs)
        return _run(AdaptedLinear, x.to(dtype), *plain)


class JoinedConv2d(Conv2d):
    """PEFT's layer over an nn.Conv2d."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [b, in, h, w] → [b, out, h', w']."""
        plain = None if args or kwargs else _plain(self, (nn.Conv2d, FrozenConv2d))
        dtype = _common_dtype(x, plain)
        base = cast(nn.Conv2d, self.base_layer)
        window = window_of(base) if plain is not None else None
        # PEFT's first factor has no dilation or groups of its base.
        if plain is None or dtype is None or x.ndim != 4 or window is None or window[2:] != ((1, 1), 1):
            return super().forward(x, *args, **kwargs)
        steps = isinstance(base, FrozenConv2d) and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if steps and has_few_places(x, base.weight, window):
            return _run(AdaptedColumns, x.to(dtype), *plain, window)
        return _run(AdaptedConv, x.to(dtype), *plain, window[:2])


def _run(function: Any, *arguments: Any) -> Tensor:
    """The function's output; where no gradient will be asked for, without autograd's bookkeeping."""
    if torch.is_grad_enabled():
        return cast(Tensor, function.apply(*arguments))
    return cast(Tensor, function.forward(_Forgets(), *arguments))


class _Forgets:
    """Stands for an autograd function's context where there is no backward pass."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Nothing is kept."""


def _plain(layer: Any, kinds: tuple[Any, ...]) -> Plain | None:
    """The layer's one active adapter, if it is no more than two factors over a frozen module of one of the classes."""
    base: Any = layer.base_layer
    is_few_bits = nn.Linear in kinds and hasattr(base, "times_transposed")
    if not (type(base) in kinds or is_few_bits) or layer.disable_adapters or layer.merged or layer.lora_variant:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    (name,) = active
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    if drops or up.bias is not None or any(_is_hooked(part) for part in (base, down, up)):
        return None
    return Plain(base if is_few_bits else base.weight, base.bias, down.weight, up.weight, float(layer.scaling[name]))


def _is_hooked(module: nn.Module) -> bool:
    """Whether something else is to happen when the module is called."""
    own: Any = module
    return bool(own._forward_hooks or own._forward_pre_hooks or own._backward_hooks or own._backward_pre_hooks)


def _common_dtype(x: Tensor, plain: Plain | None) -> torch.dtype | None:
    """The one precision that all is computed in: autocast's, or the one that all have; None where there is none."""
    if plain is None:
        return None
    device, held = x.device.type, plain.weight.dtype if isinstance(plain.weight, Tensor) else None
    if torch.is_autocast_enabled(device):
        wanted = torch.get_autocast_dtype(device)
        return wanted if held in (None, wanted) else None  # a base in another precision: autocast keeps its cast
    return x.dtype if {x.dtype} == {held or x.dtype, plain.down.dtype, plain.up.dtype} else None
