"""A network's frozen convolutions in training steps.

torch's autograd keeps a convolution's input for the weight's gradient, whether one is wanted or not. A frozen one needs
the weight alone. Over few places, on a CPU, it is computed as matrix products (lora_kit/arithmetic/few_places.py).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_kit.arithmetic import few_places
from lora_kit.arithmetic.autocast import without_autocast
from lora_kit.arithmetic.few_places import Window


class FrozenConv2d(nn.Conv2d):
    """A convolution whose weight wants no gradient. Where none flows to its input either (validation, sampling), or
    torch.compile traces it, it is nn.Conv2d to the bit."""

    def forward(self, input: Tensor) -> Tensor:
        """x [b, in, h, w] → [b, out, h', w']."""
        window = window_of(self)
        flows = torch.is_grad_enabled() and input.requires_grad and not torch.compiler.is_compiling()
        if not flows or window is None or input.ndim != 4 or self._trains():
            return super().forward(input)
        device, dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if self.weight.dtype != dtype:  # autocast keeps its cast
            return super().forward(input)
        return cast(Tensor, _Frozen.apply(input.to(dtype), self.weight, self.bias, window))

    def _trains(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


def freeze_convolutions(network: nn.Module) -> None:
    """Let the network's frozen convolutions be `FrozenConv2d`, with adapters over them too. Names, weights and hooks
    stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d and not module.weight.requires_grad:
            module.__class__ = FrozenConv2d


def window_of(conv: nn.Conv2d) -> Window | None:
    """None for one that pads by anything but zeros, or as much as it takes."""
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return None
    stride, padding, dilation = (cast("tuple[int, int]", pair) for pair in (conv.stride, conv.padding, conv.dilation))
    return Window(stride, padding, dilation, conv.groups)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.window = x.shape, window
        ctx.few = few_places.has_few_places(x, weight, window)
        if ctx.few:
            rows = few_places.product(few_places.columns(x, weight, window), weight, bias)
            return few_places.as_pictures(rows, x, weight, window)
        last = x.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if last else torch.contiguous_format
        return functional.conv2d(x, weight, bias, *window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        with without_autocast(dy):
            if ctx.few:
                gradient = few_places.columns_gradient(few_places.as_rows(dy), weight)
                return few_places.folded(gradient, ctx.shape, weight, ctx.window), None, None, None
            stride, padding, dilation, groups = ctx.window
            # Of an input that is not looked at, only shape and layout matter.
            x = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=ctx.layout)
            dx, _, _ = torch.ops.aten.convolution_backward(
                *(dy, x, weight, None, list(stride), list(padding), list(dilation)),
                *(False, [0, 0], groups, [True, False, False]),
            )
            return dx, None, None, None
