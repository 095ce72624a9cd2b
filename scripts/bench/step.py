"""A LoRA step at Stable Diffusion's size beside its floor: the frozen network's forward, and backward to activations.

    python scripts/bench/step.py [--bases sd1,sd2] [--pixels 256] [--targets attention,all-linear,all] [--rounds 7]
    python scripts/bench/step.py --precision no     in fp32: for a CPU that does not compute in bf16
    python scripts/bench/step.py --quick        does it run at all? Its figures mean nothing

The UNet is built from the published config with random weights, in bf16 or fp32, channels last. In turn, `rounds`
times: the floor (adapters off, latents that want a gradient) with glibc's allocator as it comes and with freed blocks
kept (lora_kit/allocator.py); and so kept PEFT's own layers, and ours over the frozen convolutions of a run
(lora_kit/arithmetic), each with fp32 factors of rank 16, clipping and AdamW. Medians; the ratios are of each round's
own.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn

from lora_kit.adapters import inject, set_scale
from lora_kit.adapters.joined import JoinedConv2d, JoinedLinear
from lora_kit.allocator import keep_freed_blocks
from lora_kit.arithmetic.frozen_convolution import FrozenConv2d, freeze_convolutions
from lora_kit.recipe import PresetRules
from lora_kit.targeting import make_plan, module_tree

CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
}
COLUMNS = (
    "base",
    "pixels",
    "targets",
    "modules",
    "floor, s",
    "floor, blocks kept, s",
    "PEFT",
    "joined",
    "joined / PEFT",
    "joined / first floor",
)
DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}
SMALL = {"block_out_channels": [32, 64, 64, 64], "norm_num_groups": 8}


class Inputs(NamedTuple):
    """Of one step."""

    latents: Tensor
    time: Tensor
    states: Tensor
    wanted: Tensor


class Times(NamedTuple):
    """Seconds of each round."""

    plain: list[float]
    """The floor where each large block is mapped anew."""
    floor: list[float]
    peft: list[float]
    joined: list[float]

    def ratio(self, name: str, to: str = "floor") -> float:
        """Median over rounds of the step's time over the floor's."""
        return statistics.median(a / b for a, b in zip(getattr(self, name), getattr(self, to), strict=True))


def main() -> None:
    options = _options()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for base in options.bases.split(","):
        for preset in options.targets.split(","):
            network = network_of(base, options)
            modules = adapt(network, preset)
            times = measure(network, inputs_of(base, options), options.rounds)
            row = (base, options.pixels, preset, modules, *(f"{figure:.3f}" for figure in figures(times)))
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            del network


def figures(times: Times) -> list[float]:
    """The two floors in seconds; PEFT's and our step beside the second, ours beside PEFT's and beside the first."""
    floors = [statistics.median(times.plain), statistics.median(times.floor)]
    peft, joined = times.ratio("peft"), times.ratio("joined")
    return [*floors, peft, joined, times.ratio("joined", "peft"), times.ratio("joined", "plain")]


def measure(network: nn.Module, inputs: Inputs, rounds: int) -> Times:
    """All by turns; the first round is not counted."""
    trainable = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)

    def train() -> None:
        forward_backward(network, inputs)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def floor() -> None:
        forward_backward(network, inputs._replace(latents=inputs.latents.detach().requires_grad_()))

    components = {"unet": network}
    found = Times([], [], [], [])
    for index in range(rounds + 1):
        set_scale(components, {})
        _swap(network, joins=False)
        map_large_blocks()
        seconds = [timed(floor)]
        keep_freed_blocks()
        seconds.append(_second(floor))
        set_scale(components, {"default": 1.0})
        for joins in (False, True):
            _swap(network, joins)
            seconds.append(_second(train))
        for own, value in zip(found, seconds, strict=True):
            own.extend([value] if index else [])
    return found


def map_large_blocks() -> None:
    """Undo `keep_freed_blocks`: glibc's own thresholds, at their highest (mallopt(3)), and nothing kept."""
    glibc = ctypes.CDLL(None)
    glibc.mallopt(-3, 2**25)
    glibc.mallopt(-1, 2**26)
    glibc.malloc_trim(0)


def forward_backward(network: nn.Module, inputs: Inputs) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=inputs.latents.dtype == torch.bfloat16):
        predicted = network(inputs.latents, inputs.time, inputs.states).sample
    (predicted.float() - inputs.wanted).square().mean().backward()


def _second(work: Callable[[], None]) -> float:
    """Of the second time: the first finds what another left of the heap, where its own blocks are not there yet."""
    work()
    return timed(work)


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _swap(network: nn.Module, joins: bool) -> None:
    """PEFT's forward and torch's convolutions, or ours, over the same parameters."""
    for module in network.modules():
        if isinstance(module, Linear):
            module.__class__ = JoinedLinear if joins else Linear
        elif isinstance(module, Conv2d):
            module.__class__ = JoinedConv2d if joins else Conv2d
        elif isinstance(module, FrozenConv2d):
            module.__class__ = nn.Conv2d
    if joins:
        freeze_convolutions(network)


def network_of(base: str, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        network: Any = UNet2DConditionModel(**{**CONFIGS[base], **(SMALL if options.quick else {})})
    return network.to(DTYPES[options.precision]).to(memory_format=torch.channels_last).requires_grad_(False)


def adapt(network: nn.Module, preset: str) -> int:
    components = {"unet": network}
    plan = make_plan(PresetRules.model_validate({"preset": preset, "rank": 16}), module_tree(components))
    inject(components, plan)
    return len(plan.targets)


def inputs_of(base: str, options: argparse.Namespace) -> Inputs:
    torch.manual_seed(1)
    side, batch, dtype = options.pixels // 8, options.batch, DTYPES[options.precision]
    latents = torch.randn(batch, 4, side, side).to(dtype).to(memory_format=torch.channels_last)
    states = torch.randn(batch, 77, CONFIGS[base]["cross_attention_dim"]).to(dtype)
    return Inputs(latents, torch.full((batch,), 500), states, torch.randn(batch, 4, side, side))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", default="sd1,sd2")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--targets", default="attention,all-linear,all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a toy network")
    return parser.parse_args()


if __name__ == "__main__":
    main()
