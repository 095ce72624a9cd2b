"""A frozen layer and its two factors as one autograd function: the arithmetic of lora_kit/adapters/joined.py.

The input is kept once, the update is accumulated into the output, and its gradient into the input's.

    y = W x + b + s · B (A x)        dx = Wᵀ dy + Aᵀ (s · Bᵀ dy)        (Hu et al. 2021, equation 3)
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_kit.arithmetic.autocast import without_autocast
from lora_kit.arithmetic.few_places import as_rows


class FewBits(Protocol):
    """A quantised layer (lora_kit/models/quantise.py), whose weight is there only while it computes."""

    def times(self, x: Tensor) -> Tensor:
        """x Wᵀ + b, without autograd."""
        ...

    def times_transposed(self, dy: Tensor) -> Tensor:
        """dy W, likewise."""
        ...


class AdaptedLinear(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None, all of one precision; down [r, in], up [out, r] of any.

    Autocast, where it is on, asks for that same precision (lora_kit/adapters/joined.py): its casts change nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | FewBits, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        """y [..., out]."""
        ctx.scale, ctx.precision = scale, down.dtype
        down, up = down.to(x.dtype), up.to(x.dtype)
        if isinstance(weight, Tensor):
            plain, ctx.layer = weight, None
            y = functional.linear(x, weight, bias)
        else:
            plain, ctx.layer = None, weight
            with torch.autocast(x.device.type, enabled=False):
                y = weight.times(x)
        inner = x.reshape(-1, x.shape[-1]) @ down.t()
        y.view(-1, y.shape[-1]).addmm_(inner, up.t(), alpha=scale)
        ctx.save_for_backward(x, plain, down, up, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients of input, down and up, those that are asked for."""
        x, weight, down, up, inner = ctx.saved_tensors
        needs = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        with without_autocast(dy):
            d_inner, d_up = through_up(ctx, rows, inner, up)
            d_down = (d_inner.t() @ x.reshape(-1, x.shape[-1])).to(ctx.precision) if needs[3] else None
            dx = None
            if needs[0]:
                dx = rows @ weight if weight is not None else ctx.layer.times_transposed(rows)
                dx = dx.addmm_(d_inner, down).view(x.shape)
        return dx, None, None, d_down, d_up, None


class AdaptedConv(torch.autograd.Function):
    """x [b, in, h, w], weight [out, in, kh, kw], bias [out] or None; down [r, in, kh, kw], up [out, r, 1, 1]; as in
    `AdaptedLinear`. A down that lies in channels-last memory is not laid out anew, nor is its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, window: Any
    ) -> Tensor:
        """y [b, out, h', w']; window: stride and padding."""
        ctx.scale, ctx.window, ctx.precision = scale, window, down.dtype
        down, up = down.to(x.dtype, memory_format=torch.channels_last), up.to(x.dtype).flatten(1)
        stride, padding = window
        y = functional.conv2d(x, weight, bias, stride, padding)
        inner = as_rows(functional.conv2d(x, down, None, stride, padding))
        rows = _rows_of(y)
        if rows is None:
            y.add_(_as_pictures(inner @ up.t(), y.shape), alpha=scale)
        else:
            rows.addmm_(inner, up.t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients of input, down and up, those that are asked for."""
        x, weight, down, up, inner = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with without_autocast(dy):
            rows = as_rows(dy)
            d_inner, d_up = through_up(ctx, rows, inner, up)
            dx = _conv_backward(dy, x, weight, ctx.window, (needs[0], False))[0] if needs[0] else None
            d_inner = d_inner.view(dy.shape[0], *dy.shape[2:], -1)
            dx, d_down = _down_backward(d_inner, x, down, ctx.window, dx, ctx.precision if needs[3] else None)
        return dx, None, None, d_down, as_kernel(d_up), None, None


def through_up(ctx: Any, rows: Tensor, inner: Tensor, up: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of what lies between the factors [places, r] and of up [out, r] (None: it is not wanted), of the
    output's rows [places, out]."""
    d_up = _scaled(rows.t() @ inner, ctx.scale).to(ctx.precision) if ctx.needs_input_grad[4] else None
    return _scaled(rows @ up, ctx.scale), d_up


def as_kernel(d_up: Tensor | None) -> Tensor | None:
    """[out, r] as a convolution's [out, r, 1, 1]."""
    return None if d_up is None else d_up[..., None, None]


def _scaled(made: Tensor, scale: float) -> Tensor:
    return made if scale == 1 else made.mul_(scale)


def _down_backward(
    d_inner: Tensor, x: Tensor, down: Tensor, window: Any, dx: Tensor | None, precision: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """dx with the first factor's part added, and the first factor's gradient in `precision` (None: it is not wanted).

    d_inner [b, h', w', r]. A convolution to r channels leaves most of a processor idle. Its gradients are matrix
    products once the r channels of d_inner (not the many of x) are laid out tap by tap: both come from the same
    [b·h·w, kh·kw·r].
    """
    r, channels, height, width = down.shape
    taps = _taps(d_inner, x.shape[2:], (height, width), window)
    rows = None if dx is None else _rows_of(dx)
    if taps is None or (dx is not None and rows is None):
        wanted = (dx is not None, precision is not None)
        more, d_down = _conv_backward(d_inner.permute(0, 3, 1, 2), x, down, window, wanted)
        dx = dx.add_(more) if dx is not None and more is not None else None
        return dx, None if precision is None or d_down is None else d_down.to(precision)
    if rows is not None:
        rows.addmm_(taps, _last_tap_first(down.permute(2, 3, 0, 1).reshape(height * width, -1)).view(-1, channels))
    if precision is None:
        return dx, None
    d_down = _last_tap_first((taps.t() @ as_rows(x)).view(height * width, -1))
    d_down = d_down.view(height, width, r, channels).permute(2, 3, 0, 1)
    return dx, d_down.to(precision, memory_format=torch.channels_last)


def _last_tap_first(each: Tensor) -> Tensor:
    """[kh·kw, …] the other way round, row by row: on a CPU several times as fast as `flip`."""
    return each if len(each) == 1 else each.index_select(0, torch.arange(len(each) - 1, -1, -1, device=each.device))


def _taps(d_inner: Tensor, places: Any, kernel: tuple[int, int], window: Any) -> Tensor | None:
    """d_inner [b, h', w', r] as [b·h·w, kh·kw·r]: what each of the `places` [h, w] of the input got through each tap,
    the last tap first. None where padding goes beyond the kernel.

    Through tap u, place i of the input goes to place (i + padding - u) / stride of the output, where that is whole.
    """
    (stride, padding), edges = window, []
    if kernel == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0):
        return d_inner.flatten(0, 2)
    if any(pad >= size for size, pad in zip(kernel, padding, strict=True)):
        return None
    spread = d_inner
    if tuple(stride) != (1, 1):
        b, height, width, r = d_inner.shape
        spread = d_inner.new_zeros(b, (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1, r)
        spread[:, :: stride[0], :: stride[1]] = d_inner
    for size, pad, place, there in zip(kernel, padding, places, spread.shape[1:3], strict=True):
        edges = [size - 1 - pad, place + pad - there, *edges]
    spread = functional.pad(spread, (0, 0, *edges))
    taps = spread.unfold(1, kernel[0], 1).unfold(2, kernel[1], 1).permute(0, 1, 2, 4, 5, 3)
    return taps.reshape(-1, kernel[0] * kernel[1] * d_inner.shape[3])


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


def _as_pictures(rows: Tensor, shape: torch.Size) -> Tensor:
    """[b·h·w, c] as [b, c, h, w], channels last."""
    b, c, h, w = shape
    return rows.view(b, h, w, c).permute(0, 3, 1, 2)
