"""The joined layer against PEFT's own forward: values, gradients, and when it steps aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kit.adapters import inject, set_scale
from lora_kit.adapters.joined_columns import AdaptedColumns
from lora_kit.adapters.joined_functions import AdaptedConv, AdaptedLinear
from lora_kit.adapters.layers import live_layers
from lora_kit.arithmetic import few_places
from lora_kit.arithmetic.few_places import Window
from lora_kit.arithmetic.frozen_convolution import freeze_convolutions
from lora_kit.models.quantise import quantised
from lora_kit.recipe import TargetRule
from lora_kit.targeting import make_plan, module_tree

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 40),
    "no bias": lambda: nn.Linear(24, 40, bias=False),
    "3x3": lambda: nn.Conv2d(24, 40, 3, padding=1),
    "strided": lambda: nn.Conv2d(24, 40, 3, stride=2, padding=1),
    "1x1": lambda: nn.Conv2d(24, 40, 1),
    "few places": lambda: nn.Conv2d(24, 40, 3, padding=1),
    "few places, strided": lambda: nn.Conv2d(24, 40, 3, stride=2, padding=1),
    "few places, 1x1": lambda: nn.Conv2d(24, 40, 1),
}
FEW = [kind for kind in LAYERS if kind.startswith("few")]
RANK = 4


@pytest.fixture(autouse=True)
def computes_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor that computes bf16 does is tested on every one."""
    monkeypatch.setattr(few_places, "computes_bf16", lambda: True)


def adapted(kind: str, dtype: torch.dtype, layout: torch.memory_format, **rule: Any) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": LAYERS[kind]()}).requires_grad_(False).to(dtype=dtype)
    net = net.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    components: dict[str, nn.Module] = {"unet": net}
    plan = make_plan(
        [TargetRule.model_validate({"match": "unet.**", "rank": RANK, "alpha": 6} | rule)], module_tree(components)
    )
    inject(components, plan)
    if kind in FEW:  # as a run's are
        freeze_convolutions(net)
    layer: Any = next(iter(live_layers(components).values())).lora
    with torch.no_grad():
        layer.get_submodule("lora_B.default").weight.normal_()
    return components


def inputs(kind: str, dtype: torch.dtype) -> Tensor:
    shape = (3, 7, 24) if kind in ("linear", "no bias") else (1, 24, 2, 2) if kind in FEW else (3, 24, 9, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def results(components: dict[str, nn.Module], x: Tensor, peft: bool, autocast: bool = False) -> dict[str, Tensor]:
    """Output and all gradients, by our forward or by PEFT's."""
    layer: Any = next(iter(live_layers(components).values())).lora
    ours: Any = Linear if isinstance(layer, Linear) else Conv2d
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ours.forward(layer, x) if peft else layer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    (y.float() * weights.float()).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad}
    found |= {name: one.grad for name, one in layer.named_parameters() if one.grad is not None}
    return {name: one.double() for name, one in found.items()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys() and len(a) == 4
    return {name: float((a[name] - b[name]).norm() / b[name].norm()) for name in a}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("kind", LAYERS)
def test_fp32_is_pefts_within_rounding(kind: str, layout: torch.memory_format) -> None:
    components = adapted(kind, torch.float32, layout)
    x = inputs(kind, torch.float32)
    if x.ndim == 4:
        x = x.detach().to(memory_format=layout)
    off = difference(results(components, x, peft=False), results(components, x, peft=True))
    # Sums of at most 24·9 products, in another order: each result is off by that many roundings at most.
    assert max(off.values()) < 24 * 9 * torch.finfo(torch.float32).eps
    assert any(value > 0 for value in off.values()) or kind == "no bias"  # it was another computation


@pytest.mark.parametrize("kind", ["3x3", "strided", "1x1", *FEW])
def test_a_convolutions_first_factor_and_its_gradient_lie_channels_last(kind: str) -> None:
    components = adapted(kind, torch.bfloat16, torch.channels_last)
    (down,) = (one for name, one in components["unet"].named_parameters() if "lora_A" in name)
    assert down.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y: Tensor = components["unet"]["layer"](inputs(kind, torch.bfloat16))  # pyright: ignore[reportIndexIssue]
    (made,) = torch.autograd.grad(y.sum(), down)  # as the function gives it: `.grad` is laid out as its parameter
    assert made.dtype == torch.float32
    assert made.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (1, 1), (2, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 0), (2, 2)])
def test_a_convolutions_gradients_by_taps_are_torchs(kernel: Any, stride: Any, padding: Any) -> None:
    """In float64, whatever is left over at the edges; padding beyond the kernel goes to torch's own kernel."""
    chance = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=chance, dtype=torch.float64)
        return drawn.to(memory_format=torch.channels_last).requires_grad_()

    x, down, up, weight = draw(2, 3, 9, 8), draw(2, 3, *kernel), draw(4, 2, 1, 1), draw(4, 3, *kernel).detach()
    function: Any = AdaptedConv
    y = function.apply(x, weight, None, down, up, 0.7, (stride, padding))
    conv = nn.functional.conv2d
    wanted = conv(x, weight, None, stride, padding) + 0.7 * conv(conv(x, down, None, stride, padding), up)
    dy = draw(*y.shape).detach()
    assert torch.allclose(y, wanted, rtol=1e-12, atol=1e-12)
    for got, exact in zip(
        torch.autograd.grad(y, [x, down, up], dy), torch.autograd.grad(wanted, [x, down, up], dy), strict=True
    ):
        assert torch.allclose(got, exact, rtol=1e-12, atol=1e-12)  # sums of some hundred products, rounded at 2e-16


@pytest.mark.parametrize("kind", LAYERS)
def test_bf16_is_at_least_as_near_to_the_truth_as_peft_is(kind: str) -> None:
    components = adapted(kind, torch.bfloat16, torch.channels_last)
    x = inputs(kind, torch.bfloat16)
    ours, theirs = (results(components, x, peft, autocast=True) for peft in (False, True))
    exact = adapted(kind, torch.bfloat16, torch.channels_last)
    exact["unet"].double()
    truth = results(exact, x.double(), peft=True)
    near, far = difference(ours, truth), difference(theirs, truth)
    for name in near:
        # PEFT rounds factors, products and the sum apart, we the factors, the inner product and the sum.
        assert near[name] < max(1.5 * far[name], 4 * torch.finfo(torch.bfloat16).eps), (name, near, far)


def held_in(bits: str, components: dict[str, nn.Module]) -> Any:
    """Quantise the adapted layer's base; the joined layer."""
    layer: Any = next(iter(live_layers(components).values())).lora
    layer.base_layer = quantised(layer.base_layer, bits, torch.device("cpu"))
    return layer


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["linear", "no bias"])
def test_over_a_quantised_layer_it_is_pefts_over_the_weights_that_it_stands_for(kind: str, bits: str) -> None:
    components = adapted(kind, torch.float32, torch.contiguous_format)
    layer, x = held_in(bits, components), inputs(kind, torch.float32)
    ours = results(components, x, peft=False)
    plain = nn.Linear(24, 40, bias=layer.base_layer.bias is not None).requires_grad_(False)
    plain.weight.copy_(layer.base_layer.dequantised(torch.float32))
    if layer.base_layer.bias is not None:
        plain.bias.copy_(layer.base_layer.bias)
    layer.base_layer = plain
    off = difference(ours, results(components, x, peft=True))
    assert max(off.values()) < 24 * torch.finfo(torch.float32).eps  # sums of at most 24 products in another order


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_quantised_layer_under_autocast_is_as_near_to_the_truth_as_peft_is(bits: str) -> None:
    components = adapted("linear", torch.bfloat16, torch.contiguous_format)
    layer, x = held_in(bits, components), inputs("linear", torch.bfloat16)
    ours, theirs = (results(components, x, peft, autocast=True) for peft in (False, True))
    plain = nn.Linear(24, 40, dtype=torch.float64).requires_grad_(False)
    plain.weight.copy_(layer.base_layer.dequantised(torch.float64))
    plain.bias.copy_(layer.base_layer.bias)
    layer.base_layer = plain
    truth = results({"unet": components["unet"].double()}, x.double(), peft=True)
    near, far = difference(ours, truth), difference(theirs, truth)
    for name in near:
        assert near[name] < max(1.5 * far[name], 4 * torch.finfo(torch.bfloat16).eps), (name, near, far)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_over_a_quantised_layer_the_input_is_kept_once_and_no_weight(bits: str) -> None:
    components = adapted("linear", torch.bfloat16, torch.contiguous_format)
    held_in(bits, components)
    x, kept = inputs("linear", torch.bfloat16), list[Tensor]()
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one)
    with keeping, torch.autocast("cpu", torch.bfloat16):
        components["unet"]["layer"](x)  # pyright: ignore[reportIndexIssue]
    # The factors in the precision of the product, what lies between them, and the input.
    assert sorted(one.numel() for one in kept) == sorted([x.numel(), 24 * RANK, 40 * RANK, 3 * 7 * RANK])
    assert any(one.data_ptr() == x.data_ptr() for one in kept)


def test_gradcheck_of_the_functions() -> None:
    chance = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance, dtype=torch.float64).requires_grad_()

    weight = draw(5, 4).detach()
    functions: Any = (AdaptedLinear.apply, AdaptedConv.apply, AdaptedColumns.apply)
    linear, conv, few = functions
    assert torch.autograd.gradcheck(
        lambda x, a, b: linear(x, weight, None, a, b, 0.7), (draw(2, 3, 4), draw(2, 4), draw(5, 2))
    )
    kernel = draw(5, 4, 3, 3).detach().to(memory_format=torch.channels_last)
    window = Window((2, 2), (1, 1))
    drawn = (draw(2, 4, 5, 5), draw(2, 4, 3, 3), draw(5, 2, 1, 1))
    assert torch.autograd.gradcheck(lambda x, a, b: conv(x, kernel, None, a, b, 0.7, window[:2]), drawn)
    assert torch.autograd.gradcheck(lambda x, a, b: few(x, kernel, None, a, b, 0.7, window), drawn)


def is_joined(components: dict[str, nn.Module], x: Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the layer's forward went our way."""
    used: list[bool] = []
    for function in (AdaptedLinear, AdaptedConv, AdaptedColumns):
        original = function.apply
        monkeypatch.setattr(function, "apply", lambda *args, own=original: used.append(True) or own(*args))
    components["unet"]["layer"](x)  # pyright: ignore[reportIndexIssue]
    monkeypatch.undo()
    return bool(used)


@pytest.mark.parametrize("kind", ["linear", "3x3", "few places"])
def test_it_steps_aside_for_what_it_does_not_know(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_ours(x_dtype: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32, **rule: Any) -> bool:
        components = adapted(kind, dtype, torch.channels_last, **rule)
        return is_joined(components, inputs(kind, x_dtype), monkeypatch)

    assert is_ours()
    assert not is_ours(dropout=0.1)
    assert not is_ours(rank_dropout=0.1)
    assert not is_ours(module_dropout=0.1)
    assert not is_ours(torch.bfloat16, torch.bfloat16)  # without autocast PEFT computes the factors in fp32
    components = adapted(kind, torch.float32, torch.channels_last)
    inject(components, make_plan([TargetRule(match="unet.**", rank=2)], module_tree(components)), "second")
    assert not is_joined(components, inputs(kind, torch.float32), monkeypatch)
    set_scale(components, {"default": 0.5})
    assert is_joined(components, inputs(kind, torch.float32), monkeypatch)
    set_scale(components, {"default": 0.0, "second": 0.0})
    plain = LAYERS[kind]
    torch.manual_seed(0)
    x = inputs(kind, torch.float32).detach()
    out = components["unet"]["layer"](x)  # pyright: ignore[reportIndexIssue]
    assert torch.equal(out, plain().to(memory_format=torch.channels_last)(x))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("kind", FEW)
def test_products_are_for_steps_and_sampling_has_the_bits_of_the_networks_own_convolutions(kind: str) -> None:
    ours, theirs = (adapted(kind, torch.float32, torch.channels_last) for _ in range(2))
    layer: Any = next(iter(live_layers(theirs).values())).lora
    layer.base_layer.__class__ = nn.Conv2d
    x, outputs = inputs(kind, torch.float32), list[Tensor]()
    for components in (ours, theirs):
        unet: Any = components["unet"]
        outputs.append(unet["layer"](x))
        with torch.no_grad():
            outputs.append(unet["layer"](x))
    steps, sampled, plain_steps, plain_sampled = outputs
    assert "AdaptedColumns" in str(steps.grad_fn)
    assert "AdaptedConv" in str(plain_steps.grad_fn)
    assert torch.equal(sampled, plain_sampled)


@pytest.mark.parametrize("kind", ["linear", "strided"])
def test_dropout_gives_pefts_numbers(kind: str) -> None:
    components = adapted(kind, torch.float32, torch.channels_last, dropout=0.5)
    x = inputs(kind, torch.float32)
    torch.manual_seed(3)
    ours = results(components, x, peft=False)
    torch.manual_seed(3)
    theirs = results(components, x, peft=True)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def gradients(kind: str, through: bool = False, around: bool = False) -> list[Tensor]:
    """Of input and factors, in fp32. through: a checkpoint; around: autocast is on in the backward pass."""
    components = adapted(kind, torch.float32, torch.channels_last)
    layer: Any = components["unet"]["layer"]  # pyright: ignore[reportIndexIssue]
    x = inputs(kind, torch.float32)
    out = checkpoint(layer, x, use_reentrant=False) if through else layer(x)
    assert isinstance(out, Tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        out.square().sum().backward()
    found = [x.grad, *(one.grad for one in layer.parameters() if one.requires_grad)]
    assert len(found) == 3
    return [one for one in found if one is not None]


@pytest.mark.parametrize("kind", ["linear", "3x3", "few places"])
@pytest.mark.parametrize("how", ["through", "around"])
def test_neither_a_checkpoint_nor_autocast_around_the_backward_pass_changes_gradients(kind: str, how: str) -> None:
    for one, other in zip(gradients(kind), gradients(kind, **{how: True}), strict=True):
        assert torch.equal(one, other)


def test_the_input_is_kept_once_for_several_layers() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({name: nn.Linear(64, 64) for name in "qkv"}).requires_grad_(False).to(torch.bfloat16)
    components: dict[str, nn.Module] = {"unet": net}
    inject(components, make_plan([TargetRule(match="unet.**", rank=2)], module_tree(components)))
    x = torch.randn(512, 64, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [net[name](x) for name in "qkv"]
    large = [size for size in kept.values() if size >= x.numel() * 2]
    assert large == [x.numel() * 2]
    assert all(bool(torch.isfinite(one).all()) for one in outputs)
