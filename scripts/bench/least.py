"""What a step with every layer adapted cannot take less than, beside its floor (step.py).

    python scripts/bench/least.py [--bases sd1,sd2] [--precision bf16] [--times 300]

The products that each layer of the network adds (layer.py), each alone in a loop, with all of it in the processor's
caches, nothing laid out, no autograd and no Python between them, summed over the network; the factors' casts; clipping
and AdamW. Rank 16, 256 px, batch 1. `ours`: the floor's passes through a run's own frozen convolutions
(lora_kit/arithmetic). The last column is those passes and all of the above, beside the floor.
"""

from __future__ import annotations

import argparse
import statistics
from argparse import Namespace
from collections import Counter
from typing import Any

import torch
from layer import Shapes, mean, small_products
from step import DTYPES, Inputs, adapt, forward_backward, inputs_of, network_of, timed
from torch import Tensor, nn

from lora_kit.adapters import set_scale
from lora_kit.adapters.layers import live_layers
from lora_kit.allocator import keep_freed_blocks
from lora_kit.arithmetic.frozen_convolution import freeze_convolutions

COLUMNS = ("base", "layers", "floor, s", "ours, s", "products, s", "casts, s", "clipping and AdamW, s", "at least")
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", default="sd1,sd2")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--times", type=int, default=300)
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for base in options.bases.split(","):
        print(f"| {' | '.join(row(base, options.precision, options.times))} |", flush=True)


def row(base: str, precision: str, times: int) -> list[str]:
    options, dtype = Namespace(quick=False, precision=precision, pixels=256, batch=1), DTYPES[precision]
    network, inputs = network_of(base, options), inputs_of(base, options)
    inputs = inputs._replace(latents=inputs.latents.requires_grad_())
    adapt(network, "all")
    components = {"unet": network}
    set_scale(components, {})
    keep_freed_blocks()
    found: Counter[Shapes] = Counter()
    hooks = [
        layer.base.register_forward_hook(lambda own, x, y: found.update([_shapes(own, x[0], y)]))
        for layer in live_layers(components).values()
    ]
    forward_backward(network, inputs)
    for hook in hooks:
        hook.remove()
    floor = _passes(network, inputs)
    freeze_convolutions(network)
    ours = _passes(network, inputs)
    factors = [weight for weight in network.parameters() if weight.requires_grad]
    products = sum(count * sum(small_products(shapes, times, dtype)) for shapes, count in found.items()) / 1e6
    casts, update = _casts(factors, dtype), _update(factors)
    ratio = (ours + products + casts + update) / floor
    return [base, str(found.total()), *(f"{one:.3f}" for one in (floor, ours, products, casts, update, ratio))]


def _passes(network: nn.Module, inputs: Inputs) -> float:
    """Seconds of a forward and backward pass, the median."""
    return statistics.median([timed(lambda: forward_backward(network, inputs)) for _ in range(1 + ROUNDS)][1:])


def _shapes(layer: nn.Module, x: Tensor, y: Tensor) -> Shapes:
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        conv = (layer.kernel_size, layer.stride, layer.padding)
        return Shapes(tuple(x.shape[2:]), tuple(y.shape[2:]), x.shape[1], y.shape[1], conv)
    return Shapes(tuple(x.shape[:-1]), tuple(y.shape[:-1]), x.shape[-1], y.shape[-1])


def _casts(factors: list[Any], dtype: torch.dtype) -> float:
    """Seconds: the factors to the base's precision, their gradients to fp32."""
    gradients = [factor.to(dtype) for factor in factors]
    there = mean(lambda: [factor.to(dtype) for factor in factors], 10)
    back = mean(lambda: [gradient.to(torch.float32) for gradient in gradients], 10)
    return (there + back) / 1e6


def _update(factors: list[Any]) -> float:
    """Seconds: clipping and AdamW."""
    optimizer = torch.optim.AdamW(factors, lr=1e-5, fused=True)
    for factor in factors:
        factor.grad = torch.randn_like(factor)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()

    return mean(update, 10) / 1e6


if __name__ == "__main__":
    main()
