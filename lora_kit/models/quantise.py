"""A frozen base in few bits: linear layers' weights held by bitsandbytes, one after the other, and dequantised for
each product.

nf4: Dettmers et al. 2023, "QLoRA", with double quantisation. int8: Dettmers et al. 2022, "LLM.int8()", without an
outlier part, and of the weights alone: inputs are not rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_kit.errors import RecipeError

_ROWS = 256


class WeightError(NamedTuple):
    """How far quantised weights are from the true ones: sums over elements, so that layers add up."""

    squared_error: float
    squared_weight: float

    def __add__(self, other: tuple[Any, ...]) -> WeightError:
        return WeightError(self[0] + other[0], self[1] + other[1])

    @property
    def relative(self) -> float:
        """Root mean square of the error over that of the weights."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else 0.0


class FewBitsLinear(nn.Linear):
    """A frozen linear layer whose weight bitsandbytes holds; it is there in full only while a product is computed.

    bitsandbytes' own layers compute so, too, but keep their input for the backward pass, which does not need it. What
    a product makes lies in memory before the dequantised weight does, so that this leaves no gap between activations.
    """

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that is stood for."""
        import bitsandbytes.functional as functional

        weight = cast(Any, self.weight)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            return cast(Any, functional).dequantize_4bit(weight.data, state).to(dtype)
        held, scale = cast(Tensor, weight.data), cast(Tensor, weight.SCB)[:, None].mul(1 / 127)
        made = torch.empty_like(held, dtype=dtype)
        # On a CPU an operation of mixed precisions copies all that it is given to fp32 first: of a few rows, then.
        rows = _ROWS if held.device.type == "cpu" else len(held)
        for parts in zip(held.split(rows), scale.split(rows), made.split(rows), strict=True):
            torch.mul(parts[0], parts[1], out=parts[2])
        return made

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        return cast(Tensor, _Product.apply(input, self))

    def times(self, x: Tensor) -> Tensor:
        """x Wᵀ + b, [..., in] → [..., out], without autograd."""
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(len(rows), self.out_features)
        bias = cast("Tensor | None", self.bias)
        with torch.autocast(x.device.type, enabled=False):
            weight = self.dequantised(x.dtype).t()
            torch.mm(rows, weight, out=y) if bias is None else torch.addmm(bias.to(x.dtype), rows, weight, out=y)
        return y.view(*x.shape[:-1], -1)

    def times_transposed(self, dy: Tensor) -> Tensor:
        """dy W, [..., out] → [..., in], without autograd."""
        rows = dy.reshape(-1, dy.shape[-1])
        dx = rows.new_empty(len(rows), self.in_features)
        with torch.autocast(dy.device.type, enabled=False):
            torch.mm(rows, self.dequantised(dy.dtype), out=dx)
        return dx.view(*dy.shape[:-1], -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FewBitsLinear) -> Tensor:
        ctx.layer = layer
        return layer.times(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.layer.times_transposed(dy), None


def check_quantise(kind: str, device: torch.device, sharded: bool = False) -> None:
    """Quantise one small layer on `device` and go through it and back. Raises RecipeError where that does not work.

    sharded: the networks are to be spread over processes (FSDP), which shards no 4- or 8-bit layers.
    """
    if kind == "none":
        return
    fix = "set `model.quantize: none`"
    if sharded:
        raise RecipeError(f"model.quantize: {kind} cannot be sharded by FSDP; launch with DDP, or {fix}.")
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport, reportMissingTypeStubs]
    except ImportError as error:
        raise RecipeError(
            f"model.quantize: {kind} needs the package `bitsandbytes`: {error}. Run "
            f"`pip install bitsandbytes`, or {fix}."
        ) from error
    try:
        layer = quantised(nn.Linear(64, 64), kind, device)
        x = torch.ones(1, 64, device=device, requires_grad=True)
        layer(x).sum().backward()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise RecipeError(
            f"model.quantize: {kind} does not work on the device `{device.type}` with this bitsandbytes: {error} "
            f"It is made for CUDA GPUs and runs on CPUs; use one of them, or {fix}."
        ) from error


def quantised(linear: nn.Linear, kind: str, device: torch.device) -> FewBitsLinear:
    """A frozen layer on `device` with the weights of `linear` in `kind` (`nf4`, `int8`) and its bias.

    It computes in its input's precision, and gives its input's gradient. `linear` is left as it is.
    """
    import bitsandbytes as bnb

    own: Any = bnb.nn
    weight = linear.weight.detach()
    shape = (linear.in_features, linear.out_features)
    with torch.device("meta"):  # the layer's own weights are neither drawn nor held
        made = FewBitsLinear(*shape, bias=False)
    if kind == "nf4":
        made.weight = own.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        made.weight = own.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if cast("nn.Parameter | None", linear.bias) is not None:
        made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    made.to(device)  # bitsandbytes quantises when its weight is moved
    return made.train(linear.training)


def error_of(layer: FewBitsLinear, weight: Tensor) -> WeightError:
    """Of the quantised layer against the weight that it was made from."""
    true = weight.detach().to(layer.weight.device)
    # By a few rows at a time: whole matrices in fp64 would be the most that a run of a large base holds.
    pairs = zip(layer.dequantised(torch.float32).split(_ROWS), true.split(_ROWS), strict=True)
    found = WeightError(0.0, 0.0)
    for held, wanted in pairs:
        wanted = wanted.double()
        found += WeightError(float((held - wanted).square().sum()), float(wanted.square().sum()))
    return found


def held_bytes(layers: Iterable[FewBitsLinear]) -> int:
    """Bytes of quantised layers' weights with their scales and tables, each storage once."""
    sizes = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in _parts(layers)}
    return sum(sizes.values())


def _parts(layers: Iterable[FewBitsLinear]) -> Iterator[Tensor]:
    for layer in layers:
        weight = cast(Any, layer.weight)
        yield weight.data
        state = getattr(weight, "quant_state", None)
        if state is None:
            yield weight.SCB
            continue
        yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
