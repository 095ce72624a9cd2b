"""`lora-kit merge` on the UNet of Stable Diffusion 1.5 (random fp16 weights), against diffusers and the plainest loop.

    python scripts/bench/merge.py [--folder DIR] [--repeats 3] [--rank 16]

One adapter of the given rank on every linear and convolution. Each contender is a process of its own, from its start
to its end, in turns; the table shows each one's fastest run, its anonymous memory (RssAnon, sampled every 5 ms) and
its peak resident memory (VmHWM; it counts the mapped pages of the base, which the system can drop at any time).
lora-kit syncs its file to disk before it renames it; the others leave that to the system. Therefore each has a second
time, with an fsync of its file at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}
OURS = "lora-kit merge, synced"
REFERENCE = "diffusers: load, fuse, save"
WEIGHTS = "diffusion_pytorch_model.safetensors"

DIFFUSERS = """
import sys, torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
base, adapter, out = sys.argv[1:]
unet = UNet2DConditionModel.from_pretrained(base + "/unet", torch_dtype=torch.float16)
unet.load_lora_adapter(load_file(adapter), prefix="unet")
unet.fuse_lora(lora_scale=0.8)
unet.unload_lora()
unet.save_pretrained(out)
"""
NAIVE = """
import pathlib, sys, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
base, adapter, out = sys.argv[1:]
pathlib.Path(out).mkdir()
factors, merged = load_file(adapter), {}
with safe_open(base + "/unet/diffusion_pytorch_model.safetensors", "pt") as file:
    for key in file.keys():
        weight = file.get_tensor(key)
        name = "unet." + key.removesuffix(".weight")
        if name + ".lora_A.weight" in factors:
            up, down = factors[name + ".lora_B.weight"].float(), factors[name + ".lora_A.weight"].float()
            weight = (weight.float() + 0.8 * (up.flatten(1) @ down.flatten(1)).view(weight.shape)).half()
        merged[key] = weight
save_file(merged, out + "/diffusion_pytorch_model.safetensors")
"""
SYNC = """
import os
os.fsync(os.open(sys.argv[3] + "/diffusion_pytorch_model.safetensors", os.O_RDONLY))
"""
COPY = """
import shutil, sys, pathlib
pathlib.Path(sys.argv[3]).mkdir()
shutil.copyfile(sys.argv[1] + "/unet/diffusion_pytorch_model.safetensors",
    sys.argv[3] + "/diffusion_pytorch_model.safetensors")
"""


class Cost(NamedTuple):
    seconds: float
    anonymous_mb: float
    resident_mb: float
    cpu_seconds: float = 0.0
    """Of all its cores, system and user."""


def write_base(folder: Path) -> None:
    """The folder of a pipeline of which only the UNet's weights are there."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(**UNET).half().save_pretrained(folder / "unet")
    (folder / "model_index.json").write_text(json.dumps(INDEX))


def write_adapter(path: Path, base: Path, rank: int) -> int:
    """A file in diffusers' layout for every 2-D and 4-D weight. Returns the number of modules."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    with safe_open(base / "unet" / WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            shape = file.get_slice(key).get_shape()
            if len(shape) in (2, 4) and key.endswith(".weight"):
                name = f"unet.{key.removesuffix('.weight')}"
                ones = [1] * (len(shape) - 2)
                tensors[f"{name}.lora_A.weight"] = torch.randn(rank, *shape[1:]).half() * 0.02
                tensors[f"{name}.lora_B.weight"] = torch.randn(shape[0], rank, *ones).half() * 0.02
    save_file(tensors, path)
    return len(tensors) // 2


def measure(command: Sequence[str]) -> Cost:
    """One process, from its start to its end."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = {"RssAnon": 0, "VmHWM": 0}
    sampler = threading.Thread(target=_sample, args=(process.pid, peak))
    sampler.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{errors.decode()[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(seconds, peak["RssAnon"] / 1024, peak["VmHWM"] / 1024, cpu)


def _sample(pid: int, peak: dict[str, int]) -> None:
    """Until the process has ended. Not getrusage: its figure begins with what this process has, before exec."""
    status = Path(f"/proc/{pid}/status")
    while True:
        try:
            lines = [line.split() for line in status.read_text().splitlines()]
        except OSError:
            return
        sizes = {words[0].rstrip(":"): int(words[1]) for words in lines if words and words[0].rstrip(":") in peak}
        if not sizes:  # a process that has ended has no memory
            return
        for name, size in sizes.items():
            peak[name] = max(peak[name], size)
        time.sleep(0.005)


def contenders(base: Path, adapter: Path, out: Path) -> dict[str, list[str]]:
    files = [str(base), str(adapter), str(out)]
    ours = [sys.executable, "-m", "lora_kit", "merge", str(base), "--adapter", f"{adapter}:0.8", "--out", str(out)]
    scripts = {REFERENCE: DIFFUSERS, "plain loop over safetensors": NAIVE, "copy of the file": COPY}
    commands = {
        OURS: ours,
        "lora-kit merge --no-verify, synced": [*ours, "--no-verify"],
    }
    for name, script in scripts.items():
        commands[name] = [sys.executable, "-c", script, *files]
        commands[f"{name}, synced"] = [sys.executable, "-c", script + SYNC, *files]
    return commands


def farthest(ours: Path, reference: Path) -> float:
    """Over all tensors: max |a - b| / max |b|."""
    from safetensors.torch import load_file

    got, expected = load_file(ours / "unet" / WEIGHTS), load_file(reference / WEIGHTS)
    assert got.keys() == expected.keys(), "the two wrote other tensors"
    return max(float((got[key].float() - one.float()).abs().max() / one.abs().max()) for key, one in expected.items())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the system's temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", default="", help="contenders whose names hold this text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        write_base(root / "base")
        modules = write_adapter(root / "adapter.safetensors", root / "base", options.rank)
        size = (root / "base" / "unet" / WEIGHTS).stat().st_size
        print(f"UNet of {size / 1e9:.2f} GB, rank {options.rank} on {modules} modules\n")
        os.sync()
        commands = contenders(root / "base", root / "adapter.safetensors", root / "out")
        costs: dict[str, list[Cost]] = {name: [] for name in commands if options.only in name}
        for repeat in range(options.repeats):
            for number, name in enumerate(costs):
                costs[name].append(measure(commands[name]))
                (root / "out").rename(root / f"out-{repeat}-{number}")
                if repeat or name not in (OURS, REFERENCE):
                    shutil.rmtree(root / f"out-{repeat}-{number}")
                os.sync()
        kept = [next(root.glob(f"out-0-{number}")) for number, name in enumerate(costs) if name in (OURS, REFERENCE)]
        if len(kept) == 2:
            print(
                f"largest difference from diffusers' weights, relative to a tensor's largest: {farthest(*kept):.1e}\n"
            )
    best = {name: min(found) for name, found in costs.items()}
    reference = best.get(REFERENCE)
    print("| process | seconds | of diffusers' | anonymous MB | peak resident MB |\n|---|---|---|---|---|")
    for name, (seconds, anonymous, resident, _) in best.items():
        share = f"{seconds / reference.seconds:.2f}" if reference else "–"
        print(f"| {name} | {seconds:.1f} | {share} | {anonymous:.0f} | {resident:.0f} |")


if __name__ == "__main__":
    main()
