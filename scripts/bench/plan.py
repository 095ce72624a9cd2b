"""`lora-kit plan` on the real sizes of Stable Diffusion 1.5 and 2.1: modules, seconds and memory of a cold process.

    python scripts/bench/plan.py

Writes the two bases' configs (no weights: `plan` reads none) and one picture to a temporary folder, and starts the
command anew for each preset. Peak resident memory is the child's own (getrusage).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

TINY = Path(__file__).parents[2] / "lora_kit" / "assets" / "tiny_base"
PRESETS = ("attention", "kohya", "kohya-conv", "all-linear", "all")
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
TEXT: dict[str, Any] = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
BASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SD 1.5": (
        UNET | {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
        TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
    ),
    "SD 2.1": (
        UNET
        | {
            "sample_size": 96,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        TEXT | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23},
    ),
}


def write_base(folder: Path, unet: dict[str, Any], text: dict[str, Any]) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    documents = {"model_index.json": index, "unet/config.json": unet, "text_encoder/config.json": text}
    for name, document in (documents | {"vae/config.json": VAE}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))


def measure(recipe: Path, preset: str) -> tuple[int, float, float]:
    """(modules, seconds, peak MB) of one cold `lora-kit plan`."""
    command = [sys.executable, "-m", "lora_kit", "plan", str(recipe), f"targets.preset={preset}", "--json"]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        document = json.load(process.stdout)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    return len(document["plan"]["targets"]), seconds, usage.ru_maxrss / 1000


def main() -> None:
    print("| base | preset | modules | seconds | peak MB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "data").mkdir()
        Image.new("RGB", (64, 64)).save(root / "data" / "a.png")
        (root / "data" / "a.txt").write_text("a picture")
        for base, (unet, text) in BASES.items():
            folder = root / base.replace(" ", "-")
            write_base(folder, unet, text)
            for part in ("tokenizer", "scheduler"):  # a base that a run would take, too
                shutil.copytree(TINY / part, folder / part)
            shutil.copy(TINY / "model_index.json", folder)
            recipe = root / f"{folder.name}.yaml"
            recipe.write_text(
                f"model: {{base: {folder}}}\ntargets: {{preset: kohya}}\ndata: {{sources: [{{path: data}}]}}\n"
            )
            for preset in PRESETS:
                modules, seconds, megabytes = measure(recipe, preset)
                print(f"| {base} | {preset} | {modules} | {seconds:.1f} | {megabytes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
