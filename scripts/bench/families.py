"""Every model family at its real size: one LoRA training step and one merge, seconds and peak memory.

    python scripts/bench/families.py [--only "SD 2"] [--folder DIR] [--steps 1] [--quick]

Each base is built from its published configs with random weights in bf16 and saved as its diffusers pipeline is. On it
a run of `train` (rank 16 on every linear and convolution, and on the text encoder where there is one; batch 1 at
the size the model was made for, bf16, gradient checkpointing) and a `lora-kit merge` of its adapter, each a process of
its own. A step's seconds are those of the last of `--steps` steps, the first of which warms up where there are more;
the process's hold loading, encoding and saving, too. Memory as in merge.py: resident counts the mapped base's pages,
which the system can take back. `--quick`: narrow networks and small pictures, to see that the script runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from merge import Cost, measure
from plan import BASES, VAE

from lora_kit.targeting import plan_from_json

TOKENIZER = Path(__file__).parents[2] / "lora_kit" / "assets" / "tiny_base" / "tokenizer"
Config = dict[str, Any]
Networks = dict[str, Any]


class Family(NamedTuple):
    """One row: how its base is built, and the side of its pictures in pixels."""

    build: Callable[[bool], Any]
    """`quick` → the diffusers pipeline with random weights in bf16."""
    side: int
    overrides: Mapping[str, Any] = MappingProxyType({"targets": {"text_encoder": True}})
    """What its recipe says beyond the others', section by section."""


def filled(network_class: Any, config: Any) -> Any:
    """The network with random weights in bf16, never held in another precision: matrices of the size that keeps
    activations finite, norms of one, biases of zero."""
    import torch

    with torch.device("meta"):
        network = network_class(config) if hasattr(config, "to_dict") else network_class.from_config(config)
    network = network.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.02)
            else:
                weight.fill_(float(name.endswith("weight")))
    return network


def stable_diffusion(base: str, scheduler: Mapping[str, Any], changes: Mapping[str, Any], quick: bool) -> Any:
    """SD 1, 2 or their inpainting models, by the configs of plan.py."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    unet, text = BASES[base]
    heads = [1, 2, 4, 4] if unet.get("use_linear_projection") else 8
    narrow = {"block_out_channels": [32, 64, 128, 128], "attention_head_dim": heads} if quick else {}
    vae = {"block_out_channels": [32, 32, 32, 32]} if quick else {}
    layers = {"num_hidden_layers": 2} if quick else {}
    kind = "StableDiffusionInpaintPipeline" if "in_channels" in changes else "StableDiffusionPipeline"
    make: Any = getattr(diffusers, kind)
    return make(
        vae=filled(diffusers.AutoencoderKL, VAE | vae),
        text_encoder=filled(CLIPTextModel, CLIPTextConfig(**text | layers)),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=filled(diffusers.UNet2DConditionModel, unet | changes | narrow),
        scheduler=diffusers.DDIMScheduler(**SD_SCHEDULE | scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def text2im(quick: bool) -> Any:
    """CompVis/ldm-text2im-large-256: SD 1's UNet told the states of LDMBert, a KL first stage."""
    import diffusers
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer

    unet = BASES["SD 1.5"][0] | {"cross_attention_dim": 1280, "sample_size": 32}
    narrow = {"block_out_channels": [32, 64, 128, 128]} if quick else {}
    vae = {"block_out_channels": [32, 32, 32, 32]} if quick else {}
    bert = LDMBertConfig(encoder_layers=2 if quick else 32)  # its defaults are the published one's
    with tempfile.TemporaryDirectory() as folder:
        words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture")
        (Path(folder) / "vocab.txt").write_text("\n".join(words) + "\n")
        tokenizer = BertTokenizer.from_pretrained(folder)
    return diffusers.LDMTextToImagePipeline(
        vqvae=filled(diffusers.AutoencoderKL, VAE | vae | {"sample_size": 256}),
        bert=filled(LDMBertModel, bert),
        tokenizer=tokenizer,
        unet=filled(diffusers.UNet2DConditionModel, unet | narrow),
        scheduler=diffusers.DDIMScheduler(**SD_SCHEDULE | {"steps_offset": 0}),
    )


def super_resolution(quick: bool) -> Any:
    """CompVis/ldm-super-resolution-4x-openimages, by the config.yaml of latent-diffusion's models/ldm/bsr_sr."""
    import diffusers

    unet = {
        "sample_size": 64,
        "in_channels": 6,
        "out_channels": 3,
        "block_out_channels": [32, 64, 64, 128] if quick else [160, 320, 320, 640],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D"] * 3 + ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * 3,
        "attention_head_dim": 32,
    }
    first_stage = {
        "block_out_channels": [32, 32, 32] if quick else [128, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 2,
        "latent_channels": 3,
        "num_vq_embeddings": 8192,
        "sample_size": 256,
    }
    schedule = {"beta_start": 0.0015, "beta_end": 0.0155, "beta_schedule": "scaled_linear", "clip_sample": False}
    return diffusers.LDMSuperResolutionPipeline(
        vqvae=filled(diffusers.VQModel, first_stage),
        unet=filled(diffusers.UNet2DModel, unet),
        scheduler=diffusers.DDIMScheduler(**schedule),
    )


SD_SCHEDULE: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
V = {"prediction_type": "v_prediction"}
INPAINTING = {"in_channels": 9, "sample_size": 64}
FAMILIES: dict[str, Family] = {
    "SD 1.5": Family(lambda quick: stable_diffusion("SD 1.5", {}, {}, quick), 512),
    "SD 1.5 inpainting": Family(lambda quick: stable_diffusion("SD 1.5", {}, INPAINTING, quick), 512),
    "SD 2.1 base": Family(lambda quick: stable_diffusion("SD 2.1", {}, {"sample_size": 64}, quick), 512),
    "SD 2 inpainting": Family(lambda quick: stable_diffusion("SD 2.1", {}, INPAINTING, quick), 512),
    "SD 2.1 (v)": Family(lambda quick: stable_diffusion("SD 2.1", V, {}, quick), 768),
    "LDM text2im-256": Family(text2im, 256, {"targets": {"text_encoder": True}, "save": {"format": "diffusers"}}),
    "LDM super-resolution": Family(super_resolution, 256, {"save": {"format": "diffusers"}}),
}
"""Name in the table → the family. A family needs its pipeline and little else."""


class Row(NamedTuple):
    """What was measured of one family."""

    side: int
    parameters: int
    """Of UNet and text encoder."""
    trained: int
    step: float
    """Seconds of one, and of all cores together: on a machine with other work the second tells more."""
    cpu: float
    training: Cost
    merging: Cost

    def text(self, name: str) -> str:
        numbers = f"{self.parameters / 1e6:,.0f} | {self.trained / 1e6:.1f} | {self.step:.0f} | {self.cpu:.0f}"
        costs = (f"{cost.seconds:.0f} | {cost.anonymous_mb:,.0f} | {cost.resident_mb:,.0f}" for cost in self[-2:])
        return f"| {name} | {self.side} | {numbers} | {' | '.join(costs)} |"


COLUMNS = (
    "base | pixels | million parameters | trained | step, s | CPU s | run, s | anonymous MB | resident MB | merge, s"
)
HEAD = f"| {COLUMNS} | anonymous MB | resident MB |\n{'|---' * 12}|"


def write_recipe(root: Path, side: int, steps: int, overrides: Mapping[str, Any]) -> None:
    """One picture of noise with a caption."""
    import numpy as np
    from PIL import Image

    pictures = root / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(pictures / "a.png")
    if "targets" in overrides:
        (pictures / "a.txt").write_text("a picture")
    recipe = {
        "model": {"base": str(root / "base")},
        "targets": {"preset": "all", "rank": 16},
        "data": {"sources": [{"path": str(pictures)}], "resolution": side, "batch_size": 1, "workers": 0},
        "optimizer": {"lr": 1e-4},
        "train": {"max_steps": steps, "mixed_precision": "bf16", "gradient_checkpointing": True},
        "validation": {"every": 0},
        "output_dir": str(root / "run"),
    }
    for section, values in overrides.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    (root / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML


def train_once(root: Path) -> None:
    """The run, with each step's seconds and CPU seconds in steps.json."""
    from lora_kit.recipe import load_recipe
    from lora_kit.training import run

    seconds, step = list[tuple[float, float]](), run.take_step

    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter(), time.process_time()
        done = step(*arguments, **options)
        seconds.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        return done

    run.take_step = timed
    run.train(load_recipe(root / "recipe.yaml"))
    (root / "steps.json").write_text(json.dumps(seconds))


def row_of(name: str, root: Path, steps: int, quick: bool) -> Row:
    """Build, train and merge, each in a process of its own."""
    family = FAMILIES[name]
    this = [sys.executable, __file__, "--family", name, "--folder", str(root), *(["--quick"] if quick else [])]
    measure([*this, "--do", "build"])
    side = 64 if quick else family.side
    write_recipe(root, side, steps, family.overrides)
    training = measure([*this, "--do", "train"])
    plan = plan_from_json(json.loads((root / "run" / "plan.json").read_text()))
    adapter, out = root / "run" / "adapter.safetensors", root / "out"
    command = ["-m", "lora_kit", "merge", str(root / "base"), "--adapter", str(adapter), "--out", str(out)]
    merging = measure([sys.executable, *command])
    step, cpu = json.loads((root / "steps.json").read_text())[-1]
    return Row(side, sum(plan.base_parameters.values()), plan.trainable_parameters, step, cpu, training, merging)


def build(name: str, root: Path, quick: bool) -> None:
    """Save the base."""
    import torch

    torch.manual_seed(0)
    FAMILIES[name].build(quick).save_pretrained(root / "base")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="families whose names hold this text")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the system's temporary one")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--family", choices=FAMILIES, help=argparse.SUPPRESS)
    parser.add_argument("--do", choices=("build", "train"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do == "build":
        build(options.family, options.folder, options.quick)
    elif options.do == "train":
        train_once(options.folder)
    else:
        print(f"{os.cpu_count()} cores, load before: {os.getloadavg()[0]:.1f}\n\n{HEAD}")
        for name in (name for name in FAMILIES if options.only in name):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                print(row_of(name, Path(folder), options.steps, options.quick).text(name), flush=True)


if __name__ == "__main__":
    main()
