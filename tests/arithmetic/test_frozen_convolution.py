"""Frozen convolutions in training steps: torch's numbers, whichever way they are computed, and nothing kept of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lora_kit.arithmetic import few_places
from lora_kit.arithmetic.few_places import Window, columns, columns_gradient, folded, has_few_places, product
from lora_kit.arithmetic.frozen_convolution import FrozenConv2d, freeze_convolutions, window_of

CONVOLUTIONS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "few places": ({"padding": 1}, (1, 24, 2, 2)),
    "few, strided": ({"padding": 1, "stride": 2}, (2, 24, 3, 4)),
    "few, 1x1": ({"kernel_size": 1}, (1, 24, 2, 2)),
    "few, no bias": ({"padding": 1, "bias": False}, (1, 24, 2, 2)),
    "many": ({"padding": 1}, (2, 24, 8, 8)),
    "many, strided": ({"padding": 1, "stride": 2}, (2, 24, 8, 9)),
    "dilated": ({"padding": 2, "dilation": 2}, (1, 24, 2, 2)),
    "in groups": ({"padding": 1, "groups": 4}, (1, 24, 2, 2)),
    "wrapped around": ({"padding": 1, "padding_mode": "circular"}, (1, 24, 2, 2)),
    "as much as it takes": ({"padding": "same"}, (1, 24, 2, 2)),
}
OUT = 40


class Results(NamedTuple):
    """In float64."""

    y: Tensor
    dx: Tensor


def convolution(kind: str, dtype: torch.dtype = torch.float32) -> nn.Conv2d:
    torch.manual_seed(0)
    made = nn.Conv2d(24, OUT, **{"kernel_size": 3, **CONVOLUTIONS[kind][0]}).requires_grad_(False)
    return made.to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def frozen(kind: str, dtype: torch.dtype = torch.float32) -> nn.Conv2d:
    network = nn.ModuleList([convolution(kind, dtype)])
    freeze_convolutions(network)
    (made,) = network
    assert type(made) is FrozenConv2d
    return made


def given(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(CONVOLUTIONS[kind][1], generator=torch.Generator().manual_seed(1)).to(dtype)
    return drawn.to(memory_format=torch.channels_last).requires_grad_()


def results(conv: nn.Module, x: Tensor, autocast: bool = False) -> Results:
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y: Tensor = conv(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    y.backward(dy)
    assert x.grad is not None
    return Results(y.detach().double(), x.grad.double())


def off(found: Results, truth: Results) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]


@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (1, 1), (2, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 0), (2, 2)])
def test_products_are_the_convolution(kernel: Any, stride: Any, padding: Any) -> None:
    """In float64, whatever is left over at the edges."""
    chance, window = torch.Generator().manual_seed(0), Window(stride, padding)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=chance, dtype=torch.float64)
        return drawn.to(memory_format=torch.channels_last) if len(shape) == 4 else drawn

    x, weight, bias = draw(2, 3, 9, 8).requires_grad_(), draw(4, 3, *kernel), draw(4)
    wanted = nn.functional.conv2d(x, weight, bias, stride, padding)
    rows = product(columns(x.detach(), weight, window), weight, bias)
    dy = draw(*wanted.shape)
    made = folded(columns_gradient(few_places.as_rows(dy), weight), x.shape, weight, window)
    (exact,) = torch.autograd.grad(wanted, x, dy)
    # Sums of at most 5·3·4 products, each rounded at 2e-16.
    assert torch.allclose(few_places.as_pictures(rows, x, weight, window), wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(made, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_in_fp32_it_is_torchs_within_rounding(kind: str) -> None:
    found, wanted = results(frozen(kind), given(kind)), results(convolution(kind), given(kind))
    # Sums of at most 40·9 products, in another order: each result is off by that many roundings at most.
    assert max(off(found, wanted)) < OUT * 9 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_in_bf16_it_is_as_near_to_the_truth_as_torch_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_places, "computes_bf16", lambda: True)
    dtype = torch.bfloat16
    found, theirs = (results(make(kind, dtype), given(kind), autocast=True) for make in (frozen, convolution))
    truth = results(convolution(kind, dtype).double(), given(kind).to(dtype).double())
    for near, far in zip(off(found, truth), off(theirs, truth), strict=True):
        # torch rounds each sum once. The gradient's 9 parts are rounded each, and then their sum: √2 as much.
        assert near < 1.5 * far


@pytest.mark.parametrize("kind", ["few places", "few, strided", "many", "dilated", "in groups"])
def test_nothing_is_kept_but_the_weight(kind: str) -> None:
    conv, kept = frozen(kind), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        conv(given(kind))
    assert [one.data_ptr() for one in kept] == [conv.weight.data_ptr()]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_where_no_gradient_flows_it_is_torchs_to_the_bit(kind: str) -> None:
    x, conv, plain = given(kind), frozen(kind), convolution(kind)
    with torch.no_grad():
        assert torch.equal(conv(x), plain(x))
    assert torch.equal(conv(x.detach()), plain(x))


def test_few_places_are_few_beside_the_channels() -> None:
    def few(conv: nn.Conv2d, *shape: int, device: str = "cpu") -> bool:
        window = window_of(conv)
        assert window is not None
        return has_few_places(torch.empty(shape, device=device), conv.weight, window)

    with torch.device("meta"):
        inner, strided, narrow = (nn.Conv2d(64, n, 3, s, 1) for n, s in ((1280, 1), (1280, 2), (320, 1)))
    last: Any = torch.channels_last
    inner, strided, narrow = (conv.to(memory_format=last) for conv in (inner, strided, narrow))
    assert few(inner, 1, 64, 8, 8)
    assert few(inner, 2, 64, 8, 8)
    assert not few(inner, 4, 64, 8, 8)
    assert not few(inner, 1, 64, 16, 16)
    assert few(strided, 1, 64, 16, 16)
    assert not few(narrow, 1, 64, 8, 8)
    assert not few(inner, 1, 64, 8, 8, device="meta")
    assert not few(inner.to(memory_format=torch.contiguous_format), 1, 64, 8, 8)  # pyright: ignore[reportCallIssue]


def test_few_places_in_bf16_are_products_where_the_processor_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere torch's bf16 products are the slower. fp32 does not mind."""
    window = Window((1, 1), (1, 1))
    for computes in (True, False):
        monkeypatch.setattr(few_places, "computes_bf16", lambda computes=computes: computes)
        for dtype, wanted in ((torch.bfloat16, computes), (torch.float32, True)):
            x = given("few places").to(dtype)
            assert has_few_places(x, convolution("few places", dtype).weight, window) is wanted


def test_a_convolution_that_trains_is_left_alone_and_one_that_begins_to_learns() -> None:
    trains = nn.ModuleList([convolution("few places").requires_grad_(True)])
    freeze_convolutions(trains)
    assert type(trains[0]) is nn.Conv2d
    conv = frozen("few places")
    conv.weight.requires_grad_(True)
    conv(given("few places")).sum().backward()
    assert conv.weight.grad is not None


def test_a_backward_pass_inside_autocast_is_in_the_forward_passs_precision() -> None:
    x, inside = given("few places"), given("few places")
    frozen("few places")(x).sum().backward()
    y = frozen("few places")(inside)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert x.grad is not None
    assert inside.grad is not None
    assert torch.equal(x.grad, inside.grad)
