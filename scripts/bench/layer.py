"""One adapted layer beside its base: forward and backward, rank 16, and the small products that make the rest.

    python scripts/bench/layer.py [--precision bf16] [--times 300]

Why a step with every layer adapted stays above its floor (step.py): µs of the frozen layer alone, of lora_kit's
(lora_kit/adapters/joined.py: fp32 factors, gradients of input and factors), and of each product that it adds, with the
base's own. Layers of SD 1.5 at 256 px, batch 1. Means.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from step import DTYPES
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.adapters.joined import JoinedConv2d, JoinedLinear
from lora_kit.arithmetic.frozen_convolution import freeze_convolutions

RANK = 16
LINEAR = ((1024, 320), (256, 640), (64, 1280))
"""Places, channels."""
CONV = ((320, 32), (640, 16), (1280, 8), (1280, 4))
"""Channels, places a side."""
PRODUCTS = ("base", "x A", "+ B", "dy B", "dB", "dA", "+ A")


class Shapes(NamedTuple):
    """Of a layer at batch 1."""

    places: tuple[int, ...]
    """Of its input: rows, or height and width."""
    places_out: tuple[int, ...]
    channels: int
    channels_out: int
    conv: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    """A convolution's kernel, stride and padding."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--times", type=int, default=300)
    options = parser.parse_args()
    times, dtype = options.times, DTYPES[options.precision]
    torch.manual_seed(0)
    print("| layer | input | base, µs | adapted, µs | more, µs |\n|---|---|---|---|---|")
    for places, channels in LINEAR:
        x = torch.randn(1, places, channels).to(dtype)
        _row("linear", nn.Linear(channels, channels), x, times)
    for channels, side in CONV:
        x = torch.randn(1, channels, side, side).to(dtype)
        _row("3 x 3", nn.Conv2d(channels, channels, 3, padding=1), x, times // 3)
    print(f"\n| input of the linear layer | {' | '.join(PRODUCTS)} |\n{'|---' * (len(PRODUCTS) + 1)}|")
    for places, channels in LINEAR:
        spent = products(places, channels, times, dtype)
        print(f"| {[places, channels]} | {' | '.join(f'{one:.0f}' for one in spent)} |", flush=True)


def _row(kind: str, layer: nn.Module, x: Tensor, times: int) -> None:
    network = nn.Sequential(layer.to(x.dtype)).requires_grad_(False)
    if x.ndim == 4:
        x, network = x.to(memory_format=torch.channels_last), network.to(memory_format=torch.channels_last)
    x.requires_grad_()
    dy = torch.randn_like(x)

    def passes() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            y = network(x)
        y.backward(dy)
        x.grad = None
        for weight in network.parameters():
            weight.grad = None

    base = mean(passes, times)
    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False), network)
    network[0].__class__ = JoinedConv2d if x.ndim == 4 else JoinedLinear
    freeze_convolutions(network)  # as a run does
    for name, weight in network.named_parameters():
        if "lora_" in name:  # as lora_kit lays them
            weight.data = weight.data.float()
            weight.data = weight.data.to(memory_format=torch.channels_last) if weight.ndim == 4 else weight.data
    adapted = mean(passes, times)
    print(f"| {kind} | {list(x.shape)} | {base:.0f} | {adapted:.0f} | {adapted - base:.0f} |", flush=True)


def products(places: int, channels: int, times: int, dtype: torch.dtype) -> list[float]:
    """µs of each of PRODUCTS, for a linear layer from as many channels to as many."""
    x, weight = (torch.randn(rows, channels).to(dtype) for rows in (places, channels))
    shapes = Shapes((places,), (places,), channels, channels)
    return [mean(lambda: x @ weight.t(), times), *small_products(shapes, times, dtype)]


def small_products(shapes: Shapes, times: int, dtype: torch.dtype) -> list[float]:
    """µs of each product that one layer adds. A convolution's first factor has its input's gradient and its own as
    products with [places, taps · rank]."""
    places, places_out, channels, channels_out, conv = shapes
    rows, rows_out = torch.Size(places).numel(), torch.Size(places_out).numel()
    taps = torch.Size(conv[0]).numel() if conv else 1

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, dx, y, dy = (draw(*shape) for shape in [(rows, channels)] * 2 + [(rows_out, channels_out)] * 2)
    down, up = draw(taps * RANK, channels), draw(channels_out, RANK)
    inner, laid_out = draw(rows_out, RANK), draw(rows, taps * RANK)

    def first() -> Tensor:
        if conv is None or taps == 1:
            return x @ down.t()
        picture = x.view(1, *places, channels).permute(0, 3, 1, 2)
        weight = down.view(RANK, *conv[0], channels).permute(0, 3, 1, 2)
        return functional.conv2d(picture, weight, None, conv[1], conv[2])

    made: tuple[Callable[[], object], ...] = (
        first,
        lambda: y.addmm_(inner, up.t()),
        lambda: dy @ up,
        lambda: dy.t() @ inner,
        lambda: laid_out.t() @ x,
        lambda: dx.addmm_(laid_out, down),
    )
    return [mean(product, times) for product in made]


def mean(work: Callable[[], object], times: int) -> float:
    """µs, after a tenth as often without looking."""
    for _ in range(times // 10 + 1):
        work()
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times * 1e6


if __name__ == "__main__":
    main()
