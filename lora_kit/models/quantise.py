"""A frozen base in few bits: linear layers' weights held by bitsandbytes, one after the other.

nf4: Dettmers et al. 2023, "QLoRA", with double quantisation. int8: Dettmers et al. 2022, "LLM.int8()", without an
outlier part; on CUDA it rounds the layers' inputs to 8 bits, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

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


def quantised(linear: nn.Linear, kind: str, device: torch.device) -> nn.Linear:
    """A frozen bitsandbytes layer on `device` with the weights of `linear` in `kind` (`nf4`, `int8`) and its bias.

    It computes in the weights' precision, and gives its input's gradient. `linear` is left as it is.
    """
    import bitsandbytes as bnb

    own: Any = bnb.nn
    weight = linear.weight.detach()
    shape = (linear.in_features, linear.out_features)
    with torch.device("meta"):  # the layer's own weights are neither drawn nor held
        if kind == "nf4":
            made = own.Linear4bit(*shape, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
        else:
            made = own.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=0.0)
    if kind == "nf4":
        made.support_avx512bf16_for_cpu = False  # repacks the weights at the first look at pictures: other roundings
        made.weight = own.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
    else:
        made.weight = own.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if cast("nn.Parameter | None", linear.bias) is not None:
        made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    made.to(device)  # bitsandbytes quantises when its weight is moved
    made.register_forward_pre_hook(_as_autocast)
    made.train(linear.training)
    return cast("nn.Linear", made)


def _as_autocast(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What autocast does to a plain layer's input. bitsandbytes gives its outputs in the input's precision instead, and
    an fp32 one does not fit the bf16 norm that follows."""
    x = cast(Tensor, inputs[0])
    kind = x.device.type
    return (x.to(torch.get_autocast_dtype(kind)), *inputs[1:]) if torch.is_autocast_enabled(kind) else inputs


def true_weight(layer: nn.Module) -> Tensor:
    """The fp32 weight [out, in] that a quantised layer stands for."""
    import bitsandbytes.functional as functional

    weight = cast(Any, layer.weight)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return cast(Any, functional).dequantize_4bit(weight.data, state).float()
    scales = weight.SCB if weight.SCB is not None else cast(Any, layer).state.SCB
    return weight.data.float() * (scales.float()[:, None] / 127)


def error_of(layer: nn.Module, weight: Tensor) -> WeightError:
    """Of the quantised layer against the weight that it was made from."""
    true = weight.detach().to(layer.weight.device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    # By a few rows at a time: whole matrices in fp64 would be the most that a run of a large base holds.
    pairs = zip(true_weight(layer).split(_ROWS), true.split(_ROWS), strict=True)
    found = WeightError(0.0, 0.0)
    for held, wanted in pairs:
        wanted = wanted.double()
        found += WeightError(float((held - wanted).square().sum()), float(wanted.square().sum()))
    return found


def held_bytes(layers: Iterable[nn.Module]) -> int:
    """Bytes of quantised layers' weights with their scales and tables, each storage once."""
    sizes = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in _parts(layers)}
    return sum(sizes.values())


def _parts(layers: Iterable[nn.Module]) -> Iterator[Tensor]:
    for layer in layers:
        weight = cast(Any, layer.weight)
        yield weight.data
        state = getattr(weight, "quant_state", None)
        if state is None:
            yield weight.SCB if weight.SCB is not None else cast(Any, layer).state.SCB
            continue
        yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
