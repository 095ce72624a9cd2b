"""An adapted convolution over few places as one autograd function of matrix products: the arithmetic of
lora_kit/arithmetic/few_places.py, with the factors' products over the same columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kit.adapters.joined_functions import as_kernel, through_up
from lora_kit.arithmetic.autocast import without_autocast
from lora_kit.arithmetic.few_places import (
    Window,
    as_pictures,
    as_rows,
    columns,
    columns_gradient,
    folded,
    matrix,
    product,
)


class AdaptedColumns(torch.autograd.Function):
    """x [b, in, h, w], weight [out, in, kh, kw] in channels-last memory, bias [out] or None; down [r, in, kh, kw], up
    [out, r, 1, 1]; as in `AdaptedConv`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, window: Window
    ) -> Tensor:
        """y [b, out, h', w']."""
        ctx.scale, ctx.window, ctx.precision = scale, window, down.dtype
        down, up = down.to(x.dtype, memory_format=torch.channels_last), up.to(x.dtype).flatten(1)
        seen = columns(x, weight, window)
        rows = product(seen, weight, bias)
        inner = seen @ matrix(down).t()
        rows.addmm_(inner, up.t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, inner)  # the columns are as large as kh·kw inputs
        return as_pictures(rows, x, weight, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients of input, down and up, those that are asked for."""
        x, weight, down, up, inner = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with without_autocast(dy):
            rows = as_rows(dy)
            d_inner, d_up = through_up(ctx, rows, inner, up)
            d_down = None
            if needs[3]:
                made = (d_inner.t() @ columns(x, weight, ctx.window)).to(ctx.precision)
                d_down = made.view(len(down), *down.shape[2:], -1).permute(0, 3, 1, 2)
            dx = None
            if needs[0]:
                gradient = columns_gradient(rows, weight).addmm_(d_inner, matrix(down))
                dx = folded(gradient, x.shape, weight, ctx.window)
        return dx, None, None, d_down, as_kernel(d_up), None, None
