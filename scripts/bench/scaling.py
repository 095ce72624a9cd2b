"""What several GPUs send each other in a step, reckoned from the layers: the tables of docs/scaling.md.

    python scripts/bench/scaling.py [--rate 100] [--link 12.5] [--gpus 64]

No weights are read and nothing is timed. Parameters are counted in the published configs of Stable Diffusion 1.5 and
2.1; the networks' operations by torch's FlopCounterMode on the meta device.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from lora_kit.models.known_trees import known_tree
from lora_kit.recipe import PresetRules, TargetRule
from lora_kit.targeting import make_plan

CONFIGS = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
}
BASES = (("sd1", "SD 1.5", 512), ("sd2", "SD 2.1", 768))
RULES = (
    ("`attention`, rank 16", PresetRules(preset="attention", rank=16)),
    ("`all`, rank 16", PresetRules(preset="all", rank=16)),
    ("the whole UNet", TargetRule(match="unet.**", method="full")),
)
FP32, BF16 = 4, 2


class Machine(NamedTuple):
    rate: float
    """Operations a second that a GPU keeps up, in 10¹²."""
    link: float
    """What a GPU sends a second, in 10⁹ bytes."""
    gpus: int

    @property
    def share(self) -> float:
        """Of a ring's data, what each GPU sends in one turn: (N - 1) / N."""
        return (self.gpus - 1) / self.gpus


def forward_operations(family: str, side: int) -> int:
    """Of one picture through the UNet; a multiplication and an addition are two."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS[family])
        states = torch.empty(1, 77, CONFIGS[family]["cross_attention_dim"])
        latents = torch.empty(1, 4, side // 8, side // 8)
        time = torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(latents, time, states)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100, help="10¹² operations a second that a GPU keeps up")
    parser.add_argument("--link", type=float, default=12.5, help="10⁹ bytes a second that a GPU sends")
    parser.add_argument("--gpus", type=int, default=64)
    machine = Machine(**vars(parser.parse_args()))
    print(f"{machine.gpus} GPUs, {machine.rate:g}·10¹² operations/s and {machine.link:g} GB/s each\n")
    print(
        "| base | trained | parameters | gradient, MB | sent by a GPU, MB | ms | ms to compute a picture | equal at |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for family, name, side in BASES:
        tree, forward = known_tree(family), forward_operations(family, side)
        for said, rule in RULES:
            count = make_plan([rule], tree).trainable_parameters
            # Backward to the inputs costs a forward pass, and to the weights another where all of them train.
            passes = 3 if "whole" in said else 2
            sent = 2 * machine.share * count * FP32
            wait, compute = sent / machine.link / 1e6, passes * forward / machine.rate / 1e9
            columns = (
                f"{name}, {side} px",
                said,
                f"{count:,}",
                f"{count * FP32 / 1e6:,.1f}",
                f"{sent / 1e6:,.1f}",
                f"{wait:.1f}",
                f"{compute:.1f}",
                f"{wait / compute:.2g}",
            )
            print(f"| {' | '.join(columns)} |")
    print(
        "\n| base | weights, GB | held by a GPU, GB | sent by a GPU a micro-batch, GB | ms | ms to compute a picture |"
    )
    print("|---|--:|--:|--:|--:|--:|")
    for family, name, side in BASES:
        forward = forward_operations(family, side)
        total = make_plan([RULES[2][1]], known_tree(family)).trainable_parameters
        for said, width, turns, held, passes in (
            ("adapters, frozen base in bf16", BF16, 2 * BF16, BF16, 2),
            ("the whole UNet: weights, gradient, two moments, fp32", FP32, 3 * FP32, 4 * FP32, 3),
        ):
            sent = machine.share * total * turns
            print(
                f"| {name}: {said} | {total * width / 1e9:.2f} | {total * held / machine.gpus / 1e9:.2f} | "
                f"{sent / 1e9:.2f} | {sent / machine.link / 1e6:.0f} | {passes * forward / machine.rate / 1e9:.1f} |"
            )


if __name__ == "__main__":
    main()
