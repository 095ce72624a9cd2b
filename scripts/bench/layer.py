"""One adapted layer beside its base: forward and backward, bf16, rank 16, and the small products that make the rest.

    python scripts/bench/layer.py [--times 300]
    python scripts/bench/layer.py --least sd1,sd2     what a step with every layer adapted cannot take less than

Why a step with every layer adapted stays above its floor (step.py): µs of the frozen layer alone, of lora_kit's
(lora_kit/adapters/joined.py: fp32 factors, gradients of input and factors), and of each product that it adds, with the
base's own. Layers of SD 1.5 at 256 px, batch 1. Means.

`--least`: the products that every layer of the network adds, each alone in a loop (with all of it in the processor's
caches, nothing laid out, no autograd), summed over the network; the factors' casts, clipping and AdamW; beside the
floor of step.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from step import adapt, forward_backward, inputs_of, network_of, timed
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.adapters import set_scale
from lora_kit.adapters.joined import JoinedConv2d, JoinedLinear
from lora_kit.adapters.layers import live_layers
from lora_kit.allocator import keep_freed_blocks

RANK = 16
LINEAR = ((1024, 320), (256, 640), (64, 1280))
"""Places, channels."""
CONV = ((320, 32), (640, 16), (1280, 8), (1280, 4))
"""Channels, places a side."""
PRODUCTS = ("base", "x A", "+ B", "dy B", "dB", "dA", "+ A")
LEAST = ("base", "layers", "floor, s", "products, s", "casts, s", "clipping and AdamW, s", "at least")
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=300)
    parser.add_argument("--least", default="", metavar="BASES")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.least:
        print(f"| {' | '.join(LEAST)} |\n{'|---' * len(LEAST)}|")
        for base in options.least.split(","):
            print(f"| {' | '.join(least(base, options.times))} |", flush=True)
        return
    times = options.times
    print("| layer | input | base, µs | adapted, µs | more, µs |\n|---|---|---|---|---|")
    for places, channels in LINEAR:
        _row("linear", nn.Linear(channels, channels), torch.randn(1, places, channels), times)
    for channels, side in CONV:
        _row("3 x 3", nn.Conv2d(channels, channels, 3, padding=1), torch.randn(1, channels, side, side), times // 3)
    print(f"\n| input of the linear layer | {' | '.join(PRODUCTS)} |\n{'|---' * (len(PRODUCTS) + 1)}|")
    for places, channels in LINEAR:
        print(f"| {[places, channels]} | {' | '.join(f'{spent:.0f}' for spent in products(places, channels, times))} |")


def _row(kind: str, layer: nn.Module, x: Tensor, times: int) -> None:
    network = nn.Sequential(layer.to(torch.bfloat16)).requires_grad_(False)
    x = x.to(torch.bfloat16)
    if x.ndim == 4:
        x, network = x.to(memory_format=torch.channels_last), network.to(memory_format=torch.channels_last)
    x.requires_grad_()
    dy = torch.randn_like(x)

    def passes() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x)
        y.backward(dy)
        x.grad = None
        for weight in network.parameters():
            weight.grad = None

    base = _mean(passes, times)
    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False), network)
    network[0].__class__ = JoinedConv2d if x.ndim == 4 else JoinedLinear
    for name, weight in network.named_parameters():
        if "lora_" in name:  # as lora_kit lays them
            weight.data = weight.data.float()
            weight.data = weight.data.to(memory_format=torch.channels_last) if weight.ndim == 4 else weight.data
    adapted = _mean(passes, times)
    print(f"| {kind} | {list(x.shape)} | {base:.0f} | {adapted:.0f} | {adapted - base:.0f} |", flush=True)


def products(places: int, channels: int, times: int) -> list[float]:
    """µs of each of PRODUCTS, for a linear layer from as many channels to as many."""
    x, y, dy = (torch.randn(places, channels).to(torch.bfloat16) for _ in range(3))
    down, up = (torch.randn(shape).to(torch.bfloat16) for shape in ((RANK, channels), (channels, RANK)))
    weight, inner = torch.randn(channels, channels).to(torch.bfloat16), torch.randn(places, RANK).to(torch.bfloat16)
    made: tuple[Callable[[], object], ...] = (
        lambda: x @ weight.t(),
        lambda: x @ down.t(),
        lambda: y.addmm_(inner, up.t()),
        lambda: dy @ up,
        lambda: dy.t() @ inner,
        lambda: inner.t() @ x,
        lambda: y.addmm_(inner, down),
    )
    return [_mean(product, times) for product in made]


def least(base: str, times: int) -> list[str]:
    """A row of `--least`."""
    network = network_of(base, Namespace(quick=False, precision="bf16"))
    inputs = inputs_of(base, Namespace(pixels=256, batch=1, precision="bf16"))
    components = {"unet": network}
    adapt(network, "all")
    found: Counter[tuple[Any, ...]] = Counter()
    hooks = [
        layer.base.register_forward_hook(lambda own, x, y: found.update([_shapes(own, x[0], y)]))
        for layer in live_layers(components).values()
    ]
    set_scale(components, {})
    keep_freed_blocks()
    latents = inputs.latents.detach().requires_grad_()
    forward_backward(network, inputs._replace(latents=latents))
    for hook in hooks:
        hook.remove()
    seconds = [timed(lambda: forward_backward(network, inputs._replace(latents=latents))) for _ in range(1 + ROUNDS)]
    floor = statistics.median(seconds[1:])
    factors = [weight for weight in network.parameters() if weight.requires_grad]
    products = sum(count * sum(small_products(*shapes, times)) for shapes, count in found.items()) / 1e6
    casts, update = _casts(factors), _update(factors)
    ratio = 1 + (products + casts + update) / floor
    return [base, str(found.total()), *(f"{one:.3f}" for one in (floor, products, casts, update, ratio))]


def _shapes(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, ...]:
    """Of a layer: places of the input and of the output, channels of both, kernel, stride, padding."""
    if isinstance(layer, nn.Conv2d):
        sides = (tuple(x.shape[2:]), tuple(y.shape[2:]))
        return (*sides, layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    return ((x.numel() // x.shape[-1],), (y.numel() // y.shape[-1],), x.shape[-1], y.shape[-1], None, None, None)


def small_products(
    places: Any, there: Any, channels: int, out: int, kernel: Any, stride: Any, padding: Any, times: int
) -> list[float]:
    """µs of each product that one layer adds, batch 1. A convolution's first factor has its input's gradient and its
    own as products with [places, taps · rank]."""
    taps = kernel[0] * kernel[1] if kernel else 1
    rows, rows_there = (torch.Size(one).numel() for one in (places, there))
    x, dx = (torch.randn(rows, channels).to(torch.bfloat16) for _ in range(2))
    y, dy = (torch.randn(rows_there, out).to(torch.bfloat16) for _ in range(2))
    inner, up = (torch.randn(shape).to(torch.bfloat16) for shape in ((rows_there, RANK), (out, RANK)))
    laid_out = torch.randn(rows, taps * RANK).to(torch.bfloat16)
    down = torch.randn(taps * RANK, channels).to(torch.bfloat16)
    first: Callable[[], object] = lambda: x @ down.t()  # noqa: E731
    if taps > 1:
        picture = x.view(1, *places, channels).permute(0, 3, 1, 2)
        weight = down.view(RANK, *kernel, channels).permute(0, 3, 1, 2)
        first = lambda: functional.conv2d(picture, weight, None, stride, padding)  # noqa: E731
    made: tuple[Callable[[], object], ...] = (
        first,
        lambda: y.addmm_(inner, up.t()),
        lambda: dy @ up,
        lambda: dy.t() @ inner,
        lambda: laid_out.t() @ x,
        lambda: dx.addmm_(laid_out, down),
    )
    return [_mean(product, times) for product in made]


def _casts(factors: list[Any]) -> float:
    """Seconds: the factors to bf16, their gradients to fp32."""
    gradients = [factor.to(torch.bfloat16) for factor in factors]
    there = lambda: [factor.to(torch.bfloat16) for factor in factors]  # noqa: E731
    back = lambda: [gradient.to(torch.float32) for gradient in gradients]  # noqa: E731
    return (_mean(there, 10) + _mean(back, 10)) / 1e6


def _update(factors: list[Any]) -> float:
    """Seconds: clipping and AdamW."""
    optimizer = torch.optim.AdamW(factors, lr=1e-5, fused=True)
    for factor in factors:
        factor.grad = torch.randn_like(factor)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()

    return _mean(update, 10) / 1e6


def _mean(work: Callable[[], object], times: int) -> float:
    """µs, after a tenth as often without looking."""
    for _ in range(times // 10 + 1):
        work()
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times * 1e6


if __name__ == "__main__":
    main()
