"""A frozen convolution over few places: torch's own, and as matrix products (lora_kit/arithmetic/few_places.py).

    python scripts/bench/few_places.py [--precision bf16] [--times 15]

SD 1.5's inner 3 x 3 convolutions, at 256 and 512 px and several pictures: ms of the forward pass, and of the backward
pass to the input, medians; before each, 64 MiB of other memory are gone through, as a step does it with other weights.
`chosen`: what a run takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from lora_kit.allocator import keep_freed_blocks
from lora_kit.arithmetic.few_places import (
    Window,
    as_rows,
    columns,
    columns_gradient,
    folded,
    has_few_places,
    product,
)

SHAPES = (
    *((1, 1280, 1280, 4), (1, 2560, 1280, 4), (4, 1280, 1280, 4), (1, 1280, 1280, 8), (1, 2560, 1280, 8)),
    *((2, 1280, 1280, 8), (1, 1280, 1280, 16), (1, 640, 640, 8), (1, 640, 640, 16)),
)
"""Pictures, channels in and out, places a side."""
WINDOW = Window((1, 1), (1, 1))
DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--times", type=int, default=15)
    options = parser.parse_args()
    keep_freed_blocks()
    torch.manual_seed(0)
    print("| pictures, in, out, side | places | forward: torch | products | backward: torch | products | chosen |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        print(f"| {' | '.join(row(shape, DTYPES[options.precision], options.times))} |", flush=True)


def row(shape: tuple[int, int, int, int], dtype: torch.dtype, times: int) -> list[str]:
    pictures, channels, out, side = shape

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype=dtype, memory_format=torch.channels_last)

    x, dy = draw(pictures, channels, side, side), draw(pictures, out, side, side)
    weight, bias = draw(out, channels, 3, 3), torch.randn(out).to(dtype)
    ones = [1, 1]
    ways: tuple[Callable[[], object], ...] = (
        lambda: functional.conv2d(x, weight, bias, 1, 1),
        lambda: product(columns(x, weight, WINDOW), weight, bias),
        lambda: torch.ops.aten.convolution_backward(
            dy, x, weight, None, ones, ones, ones, False, [0, 0], 1, [True, False, False]
        ),
        lambda: folded(columns_gradient(as_rows(dy), weight), x.shape, weight, WINDOW),
    )
    seconds = [f"{_median(way, times) * 1e3:.1f}" for way in ways]
    chosen = "products" if has_few_places(x, weight, WINDOW) else "torch"
    return [", ".join(map(str, shape)), str(pictures * side * side), *seconds, chosen]


def _median(way: Callable[[], object], times: int) -> float:
    others, found = torch.zeros(2**24), list[float]()
    for _ in range(times + 2):
        others.add_(1)
        began = time.perf_counter()
        way()
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])


if __name__ == "__main__":
    main()
