"""The frozen network's own passes, at a job's batch and size: no adapter, optimizer, picture, text or start.

    python scripts/bench/job/bare.py SETTINGS.json

What a step cannot take less than while it goes through this network: forward, and backward to the activations, as
lora_kit holds it (its precision, channels last, its own frozen convolutions, freed blocks kept). Writes bare.json:
`seconds`, the median of 20 passes; `work`, how many multiplications a step with the job's adapters makes for each one
of the frozen network's.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from plain import peft_adapter
from torch.utils.flop_counter import FlopCounterMode

from lora_kit.allocator import keep_freed_blocks
from lora_kit.arithmetic.frozen_convolution import freeze_convolutions

PASSES, BEFORE = 20, 3
TOKENS = 77


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    keep_freed_blocks()
    torch.manual_seed(job.seed)
    dtype = torch.bfloat16 if job.autocast == "bf16" else torch.float32
    network: Any = UNet2DConditionModel.from_pretrained(job.base, subfolder="unet", torch_dtype=dtype)
    network = network.requires_grad_(False).to(memory_format=torch.channels_last).train()
    freeze_convolutions(network)
    halvings = len(json.loads((Path(job.base) / "vae" / "config.json").read_text())["block_out_channels"]) - 1
    side = job.resolution // 2**halvings
    latents = torch.randn(job.batch_size, 4, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    states = torch.randn(job.batch_size, TOKENS, network.config.cross_attention_dim, dtype=dtype)

    def passes() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            predicted = network(latents.requires_grad_(), torch.full((job.batch_size,), 500), states).sample
        predicted.float().square().mean().backward()
        latents.grad = None

    seconds: list[float] = []
    for _ in range(BEFORE + PASSES):
        began = time.perf_counter()
        passes()
        seconds.append(time.perf_counter() - began)
    counts: list[int] = []
    for adapts in (False, True):
        if adapts:
            peft_adapter(network, job)
        with FlopCounterMode(display=False) as counter:
            passes()
        counts.append(counter.get_total_flops())
    found = {"seconds": statistics.median(seconds[BEFORE:]), "work": counts[1] / counts[0]}
    (Path(job.out) / "bare.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
