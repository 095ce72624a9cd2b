"""A LoRA step over a frozen UNet in bf16, int8 and nf4: resident memory and seconds.

    python scripts/bench/quantised.py [--quick] [--device cuda]

The UNet has Stable Diffusion 1.5's shape and random weights (`--quick`: a small one, to see that the script runs). Each
row is a process of its own. On a CPU the memory is the process's resident set once the base is ready, and its peak over
the steps; on CUDA, what torch holds on the GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("bf16", "int8", "nf4")
SD15: dict[str, Any] = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "sample_size": 64}
QUICK: dict[str, Any] = {
    "block_out_channels": (64, 128),
    "cross_attention_dim": 64,
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def main() -> None:
    """Measure each kind in its own process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options.kind, options.quick, options.device, options.steps)))
        return
    print(f"{'base':6} {'weights MB':>11} {'ready MB':>9} {'peak MB':>9} {'s / step':>9} {'rms error':>10}")
    for kind in KINDS:
        command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{kind:6} {row['weights']:11,.0f} {row['ready']:9,.0f} {row['peak']:9,.0f} {row['seconds']:9.3f} "
            f"{row['error']:10.2%}"
        )


def measure(kind: str, quick: bool, device_name: str, steps: int) -> dict[str, float]:
    """MB of the frozen weights, MB held when ready and at the peak, and the median seconds of a step."""
    import torch

    device = torch.device(device_name)
    unet, weights, error = _base(kind, QUICK if quick else SD15, device)
    trained = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    memory = _memory(device)
    _give_back()
    ready = memory("now")
    config = unet.config
    sample = torch.randn(1, 4, config.sample_size, config.sample_size, device=device)
    states = torch.randn(1, 77, config.cross_attention_dim, device=device)
    took: list[float] = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = unet(sample, torch.tensor([500], device=device), states).sample.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    seconds = sorted(took[1:])[steps // 2]  # the first step warms up
    return {"weights": weights / 1e6, "ready": ready, "peak": memory("peak"), "seconds": seconds, "error": error}


def _base(kind: str, config: dict[str, Any], device: Any) -> tuple[Any, int, float]:
    """The UNet with LoRA on its attention layers, the bytes of its frozen weights, and the quantised ones' error."""
    import torch
    from diffusers import UNet2DConditionModel

    from lora_kit.adapters import inject
    from lora_kit.recipe import PresetRules
    from lora_kit.targeting import make_plan, module_tree
    from lora_kit.targeting.quantised import quantised_layers
    from lora_kit.training.quantised_base import quantise_base

    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(**config)
    unet.to(torch.bfloat16).requires_grad_(False)
    components = {"unet": unet}
    tree = module_tree(components)
    plan = make_plan(PresetRules(preset="attention", rank=16), tree)
    inject(components, plan)
    whole = sum(weight.numel() * weight.element_size() for weight in unet.parameters() if not weight.requires_grad)
    if kind == "bf16":
        return unet.to(device), whole, 0.0
    done = quantise_base(components, quantised_layers(kind, tree, plan), device)
    return unet.to(device), whole - done.before + done.after, done.errors["unet"].relative


def _memory(device: Any) -> Callable[[str], float]:
    """A function ("now" or "peak") → MB."""
    import torch

    def on_gpu(when: str) -> float:
        size = torch.cuda.memory_allocated() if when == "now" else torch.cuda.max_memory_allocated()
        return size / 1e6

    def resident(when: str) -> float:
        key = "VmRSS:" if when == "now" else "VmHWM:"
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024 / 1e6

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return on_gpu
    return resident


def _give_back() -> None:
    """What the allocator keeps of freed weights goes back to the system, and the peak counts from here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
