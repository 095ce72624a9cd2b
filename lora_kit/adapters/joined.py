"""PEFT's LoRA layers with base and update computed as one operation.

PEFT adds the update to the base's output in three passes over it, copies the input into the factors' precision, and
autograd keeps that copy for each of q, k and v. Here the frozen layer and the two factors are one autograd function:
the input is kept once, the update is accumulated into the output, and its gradient into the input's. Parameters, names
and numbers are PEFT's; whatever else a PEFT layer may be asked for goes to PEFT's own forward.

    y = W x + b + s · B (A x)        dx = Wᵀ dy + Aᵀ (s · Bᵀ dy)        (Hu et al. 2021, equation 3)
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Plain(NamedTuple):
    """What one active adapter over a frozen layer is computed from."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    """fp32 [r, in, …]."""
    up: Tensor
    """fp32 [out, r, …]."""
    scale: float


class JoinedLinear(Linear):
    """PEFT's layer over an nn.Linear."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [..., in] → [..., out]."""
        plain = None if args or kwargs else _plain(self, nn.Linear)
        dtype = _common_dtype(x, plain)
        if plain is None or dtype is None:
            return super().forward(x, *args, **kwargs)
        return cast(Tensor, _Linear.apply(x.to(dtype), *_cast(plain, dtype), plain.scale))


class JoinedConv2d(Conv2d):
    """PEFT's layer over an nn.Conv2d."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [b, in, h, w] → [b, out, h', w']."""
        plain = None if args or kwargs else _plain(self, nn.Conv2d)
        dtype = _common_dtype(x, plain)
        base = cast(nn.Conv2d, self.base_layer)
        if plain is None or dtype is None or x.ndim != 4 or not _is_usual(base):
            return super().forward(x, *args, **kwargs)
        window = (base.stride, base.padding)
        return cast(Tensor, _Conv.apply(x.to(dtype), *_cast(plain, dtype), plain.scale, window))


def _is_usual(conv: nn.Conv2d) -> bool:
    """PEFT's first factor has no dilation, padding mode or groups of its base."""
    simple = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return simple and not isinstance(conv.padding, str)


def _plain(layer: Any, kind: Any) -> Plain | None:
    """The layer's one active adapter, if it is no more than two factors over a frozen module of class `kind`."""
    base: Any = layer.base_layer
    if type(base) is not kind or layer.disable_adapters or layer.merged or layer.lora_variant:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    (name,) = active
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    if drops or up.bias is not None or any(_is_hooked(part) for part in (base, down, up)):
        return None
    return Plain(base.weight, base.bias, down.weight, up.weight, float(layer.scaling[name]))


def _is_hooked(module: nn.Module) -> bool:
    """Whether something else is to happen when the module is called."""
    own: Any = module
    return bool(own._forward_hooks or own._forward_pre_hooks or own._backward_hooks or own._backward_pre_hooks)


def _common_dtype(x: Tensor, plain: Plain | None) -> torch.dtype | None:
    """The one precision that all is computed in: autocast's, or the one that all have; None where there is none."""
    if plain is None:
        return None
    device = x.device.type
    if torch.is_autocast_enabled(device):
        wanted = torch.get_autocast_dtype(device)
        return wanted if plain.weight.dtype == wanted else None  # a base in another precision: autocast keeps its cast
    return x.dtype if {x.dtype} == {plain.weight.dtype, plain.down.dtype, plain.up.dtype} else None


def _cast(plain: Plain, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    return plain.weight, plain.bias, plain.down.to(dtype), plain.up.to(dtype)


class _Linear(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None, down [r, in], up [out, r], all of one precision."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = functional.linear(x, weight, bias)
            inner = x.reshape(-1, x.shape[-1]) @ down.t()
            y.view(-1, y.shape[-1]).addmm_(inner, up.t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, down, up, inner = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        with torch.autocast(dy.device.type, enabled=False):
            d_inner = (rows @ up).mul_(ctx.scale)
            d_up = (rows.t() @ inner).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
            d_down = d_inner.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[3] else None
            dx = None
            if ctx.needs_input_grad[0]:
                dx = (rows @ weight).addmm_(d_inner, down).view(x.shape)
        return dx, None, None, d_down, d_up, None


class _Conv(torch.autograd.Function):
    """x [b, in, h, w], weight [out, in, kh, kw], down [r, in, kh, kw], up [out, r, 1, 1], all of one precision."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, window: Any
    ) -> Tensor:
        stride, padding = window
        with torch.autocast(x.device.type, enabled=False):
            y = functional.conv2d(x, weight, bias, stride, padding)
            inner = functional.conv2d(x, down, None, stride, padding)
            rows = _rows_of(y)
            if rows is None:
                y.add_(functional.conv2d(inner, up), alpha=scale)
            else:
                rows.addmm_(_as_rows(inner), up.flatten(1).t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scale, ctx.window = scale, window
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, down, up, inner = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):
            rows = _as_rows(dy)
            d_inner = _like((rows @ up.flatten(1)).mul_(ctx.scale), inner)
            d_up = (rows.t() @ _as_rows(inner)).mul_(ctx.scale).view(up.shape) if needs[4] else None
            dx = _conv_backward(dy, x, weight, ctx.window, (needs[0], False))[0] if needs[0] else None
            more, d_down = _conv_backward(d_inner, x, down, ctx.window, (needs[0], needs[3]))
            if dx is not None and more is not None:
                dx.add_(more)
        return dx, None, None, d_down, d_up, None, None


def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, window: Any, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of conv2d's input and weight, those that are needed."""
    stride, padding = window
    made = torch.ops.aten.convolution_backward(
        dy, x, weight, None, list(stride), list(padding), [1, 1], False, [0, 0], 1, [*needs, False]
    )
    return made[0], made[1]


def _rows_of(y: Tensor) -> Tensor | None:
    """[b, c, h, w] as [b·h·w, c] over the same memory, if it lies so (channels last)."""
    last = y.permute(0, 2, 3, 1)
    return last.view(-1, y.shape[1]) if last.is_contiguous() else None


def _as_rows(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])


def _like(rows: Tensor, shape: Tensor) -> Tensor:
    """[b·h·w, c] as [b, c, h, w], channels last."""
    b, c, h, w = shape.shape
    return rows.view(b, h, w, c).permute(0, 3, 1, 2)
