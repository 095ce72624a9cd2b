"""A convolution over few places as matrix products, for a CPU.

oneDNN lays a convolution's weight out anew in every call, forward and back. A U-Net's innermost convolutions have
millions of weights and 16 or 64 places: there that takes longer than the multiplications. A product of the input's
windows ("im2col", Chellapilla et al. 2006) with the weight, read where it lies, copies only the windows, which are
small then (docs/benchmarks/step.md). Numbers differ from the convolution's by the order of sums.

All tensors lie in channels-last memory: a weight is a matrix [out, kh·kw·in].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lora_kit.arithmetic.bf16 import computes_bf16

_CHANNELS_A_PLACE = 8
"""Measured on two cores: fewer places than an eighth of the output's channels take less time so, in bf16 and fp32,
128 about as much, and more take more."""


class Window(NamedTuple):
    """How a convolution goes over its input."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def has_few_places(x: Tensor, weight: Tensor, window: Window) -> bool:
    """Whether products are the faster way for x [b, in, h, w] and weight [out, in, kh, kw], and possible."""
    if x.device.type != "cpu" or window.dilation != (1, 1) or window.groups != 1:
        return False
    if weight.dtype == torch.bfloat16 and not computes_bf16():
        return False  # products are the slower there
    height, width = _places(x.shape, weight.shape, window)
    few = min(height, width) > 0 and _CHANNELS_A_PLACE * len(x) * height * width <= len(weight)
    return few and weight.is_contiguous(memory_format=torch.channels_last)


def columns(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """What each place of the output sees of x: [b·h'·w', kh·kw·in]."""
    (high, wide), (step_y, step_x) = window.padding, window.stride
    padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, wide, wide, high, high)).contiguous()
    kernel = tuple(weight.shape[2:])
    shape = (len(x), *_places(x.shape, weight.shape, window), *kernel, x.shape[1])
    whole, row, place, one = padded.stride()
    seen = padded.as_strided(shape, (whole, step_y * row, step_x * place, row, place, one))
    return seen.reshape(shape[0] * shape[1] * shape[2], -1)


def matrix(weight: Tensor) -> Tensor:
    """[out, kh·kw·in], over the same memory."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def product(seen: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution's output as rows [b·h'·w', out], of `columns`."""
    # The weight stands on the left: on the right a CPU's product would copy it, block by block, into its own layout.
    held, seen = matrix(weight), seen.t()
    made = held @ seen if bias is None else torch.addmm(bias[:, None], held, seen)
    return made.t().contiguous()


def columns_gradient(rows: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `columns`, of the output's [b·h'·w', out]."""
    held = matrix(weight)
    # In fp32 the other order takes up to twice as long; in bf16 this one a fifth more.
    return (held.t() @ rows.t()).t() if rows.dtype == torch.float32 else rows @ held


def folded(gradient: Tensor, shape: torch.Size, weight: Tensor, window: Window) -> Tensor:
    """The gradient of x [b, in, h, w], of that of its `columns`: each place's parts are added up, in fp32 at least."""
    b, channels, height, width = shape
    (high, wide), (step_y, step_x) = window.padding, window.stride
    there_y, there_x = _places(shape, weight.shape, window)
    precise = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    parts = precise.reshape(b, there_y, there_x, *weight.shape[2:], channels)
    padded = parts.new_zeros(b, height + 2 * high, width + 2 * wide, channels)
    for y in range(weight.shape[2]):
        for x in range(weight.shape[3]):
            there = padded[:, y : y + step_y * there_y : step_y, x : x + step_x * there_x : step_x]
            there.add_(parts[:, :, :, y, x])
    made = padded[:, high : high + height, wide : wide + width]
    return made.to(gradient.dtype, memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def as_rows(y: Tensor) -> Tensor:
    """[b, c, h, w] as [b·h·w, c]."""
    return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])


def as_pictures(rows: Tensor, x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """The output's rows as [b, out, h', w'] over the same memory."""
    return rows.view(len(x), *_places(x.shape, weight.shape, window), -1).permute(0, 3, 1, 2)


def _places(shape: Any, kernel: Any, window: Window) -> tuple[int, int]:
    """[h', w'] of the output."""
    (step_y, step_x), (high, wide) = window.stride, window.padding
    return (shape[2] + 2 * high - kernel[2]) // step_y + 1, (shape[3] + 2 * wide - kernel[3]) // step_x + 1
