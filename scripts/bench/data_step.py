"""The loader against a training step of Stable Diffusion 1.5's size, and the whole step against plain diffusers'.

The networks have SD 1.5's shapes and random weights; of the text encoder only the vocabulary is smaller, whose
table is looked up, not multiplied. Plain diffusers here is what its example train_text_to_image_lora.py does in a
step: decode and crop the picture, VAE, text encoder, UNet with PEFT's LoRA, clip, AdamW.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image, ImageOps
from plan import BASES, VAE, write_base
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_kit.data import Batch, Record, Records, TrainingSet, make_loader
from lora_kit.data.cache import CacheStore, DiskLatents
from lora_kit.models.loading import TINY_FOLDER
from lora_kit.recipe import Recipe, load_recipe
from lora_kit.training.build import build_run
from lora_kit.training.objects import Run
from lora_kit.training.processes.launch import build_accelerator
from lora_kit.training.step import training_step

RANK = 16
LATENT = (4, 64, 64)
"""Of 512 px."""
WORKERS = 2
_SMALL: dict[str, Any] = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


class Sizes(NamedTuple):
    """What is measured."""

    pixels: int
    batch: int
    steps: int
    """Of each kind, after one that is not counted."""
    entries: int
    """Cached pictures that the loader reads."""
    quick: bool
    """Networks of toy size: shows that this script works, and nothing else."""


def tables(sizes: Sizes, root: Path) -> None:
    """Print both tables."""
    recipe = load_recipe(write_recipe(root, sizes))
    run = build_run(recipe, build_accelerator(recipe))
    plain = Plain(root / "base", root / "pictures", sizes, run.accelerator)
    ours, theirs = measure_steps(run, plain, sizes.steps)
    device = run.accelerator.device
    print(f"\n### A whole step: batch {sizes.batch}, {sizes.pixels} px, bf16, attention rank {RANK}, {device}\n")
    print("| | median seconds | fastest |\n|---|---|---|")
    print(
        f"| lora_kit, latents and text states from the disk cache | {statistics.median(ours):.3f} | {min(ours):.3f} |"
    )
    print(
        f"| plain diffusers, VAE and text encoder in the step | {statistics.median(theirs):.3f} | {min(theirs):.3f} |"
    )
    print(f"\nratio of medians: {statistics.median(ours) / statistics.median(theirs):.2f}")
    needed = sizes.batch / min(ours)
    rate = loader_rate(root, sizes)
    print(f"\n### The loader: disk cache, latents of 512 px (mean and deviation, fp32), {WORKERS} workers\n")
    print("| | pictures a second |\n|---|---|")
    print(f"| loader | {rate:.0f} |\n| the fastest of lora_kit's steps above | {needed:.2f} |")
    print(f"\nthe loader is {rate / needed:.0f} times as fast as the step", flush=True)


def write_recipe(root: Path, sizes: Sizes) -> Path:
    """A base of SD 1.5's shapes, a few pictures, and the recipe that trains on them."""
    _write_base(root / "base", sizes.quick)
    (root / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for number in range(8):
        coarse = Image.fromarray(draw.integers(0, 256, (16, 24, 3), dtype=np.uint8))
        coarse.resize((960, 640), Image.Resampling.BICUBIC).save(root / "pictures" / f"{number}.jpg")
        (root / "pictures" / f"{number}.txt").write_text(f"picture number {number}")
    sections = {
        "model": {"base": str(root / "base"), "weights": "fresh"},
        "targets": {"preset": "attention", "rank": RANK},
        "data": {
            "sources": [{"path": str(root / "pictures")}],
            "resolution": sizes.pixels,
            "batch_size": sizes.batch,
            "cache": "disk",
            "cache_dir": str(root / "cache"),
            "workers": WORKERS,
        },
        "train": {"max_steps": sizes.steps + 1, "mixed_precision": "bf16"},
        "output_dir": str(root / "run"),
    }
    (root / "recipe.yaml").write_text(json.dumps(sections))  # JSON is YAML
    return root / "recipe.yaml"


def _write_base(folder: Path, quick: bool) -> None:
    unet, text = BASES["SD 1.5"]
    tokenizer = CLIPTokenizer.from_pretrained(TINY_FOLDER / "tokenizer")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = text | ends | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    vae = VAE
    if quick:
        unet = unet | _SMALL | {"attention_head_dim": 4}
        vae = VAE | {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
        text = text | {"num_hidden_layers": 1}
    write_base(folder, unet, text)
    shutil.copy(TINY_FOLDER / "model_index.json", folder)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(TINY_FOLDER / name, folder / name)
    torch.manual_seed(0)
    AutoencoderKL.from_config(vae).save_pretrained(folder / "vae")


class Pictures(Dataset[dict[str, Any]]):
    """As the example's data set: resize, crop, flip, normalise, tokens."""

    def __init__(self, folder: Path, tokenizer: CLIPTokenizer, pixels: int) -> None:
        self.files = sorted(folder.glob("*.jpg"))
        self.pixels = pixels
        texts = [file.with_suffix(".txt").read_text() for file in self.files]
        told: Any = tokenizer(texts, max_length=77, padding="max_length", truncation=True, return_tensors="pt")
        self.tokens: Tensor = told.input_ids

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        which = index % len(self.files)
        side = self.pixels
        image = ImageOps.fit(Image.open(self.files[which]).convert("RGB"), (side, side), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixels": pixels, "tokens": self.tokens[which]}


class Plain:
    """The example's step, with networks of its own."""

    def __init__(self, base: Path, pictures: Path, sizes: Sizes, accelerator: Accelerator) -> None:
        device, dtype = accelerator.device, torch.bfloat16
        self.accelerator = accelerator
        unet: Any = UNet2DConditionModel.from_config(json.loads((base / "unet" / "config.json").read_text()))
        self.unet = unet.requires_grad_(False).to(device, dtype)
        self.vae: Any = AutoencoderKL.from_pretrained(base / "vae").requires_grad_(False).to(device, dtype)
        text: Any = CLIPTextModel(CLIPTextConfig.from_pretrained(base / "text_encoder"))
        self.text_encoder = text.requires_grad_(False).to(device, dtype)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
        cast_training_params(self.unet, dtype=torch.float32)
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        data = Pictures(pictures, tokenizer, sizes.pixels)
        self.batches: Iterator[Any] = iter(DataLoader(data, sizes.batch, num_workers=WORKERS))

    def step(self) -> None:
        batch = next(self.batches)
        device, dtype = self.accelerator.device, torch.bfloat16
        with self.accelerator.autocast():
            latents = self.vae.encode(batch["pixels"].to(device, dtype)).latent_dist.sample()
            latents = latents * self.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            times = torch.randint(0, 1000, (len(latents),), device=device)
            noisy = self.schedule.add_noise(latents, noise, times)
            states = self.text_encoder(batch["tokens"].to(device), return_dict=False)[0]
            predicted = self.unet(noisy, times, states, return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        float(loss.detach())


def measure_steps(run: Run, plain: Plain, count: int) -> tuple[list[float], list[float]]:
    """Seconds of each step of lora_kit and of plain diffusers, taken in turn; the first of each does not count."""
    assert not run.prepared.needs_vae
    loader = make_loader(run.data, run.recipe, run.accelerator)
    ours, theirs = list[float](), list[float]()
    for step in range(count + 1):
        ours.append(_seconds(lambda step=step: _our_step(run, loader, step)))
        theirs.append(_seconds(plain.step))
    return ours[1:], theirs[1:]


def _our_step(run: Run, loader: Iterator[list[Batch]], step: int) -> None:
    training_step(run.learner, next(loader), step)


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def loader_rate(root: Path, sizes: Sizes) -> float:
    """Pictures a second of the loader, once its workers are up: from the disk cache to batches, nothing done with them.
    All entries lie in the page cache, as those of a set that was just filled, or read once."""
    store = CacheStore(root / "loader-cache")
    keys = [hashlib.sha256(str(number).encode()).digest() for number in range(sizes.entries)]
    drawn = torch.Generator().manual_seed(0)
    with store:
        for key in keys:
            store.put(key, {"mean": torch.randn(LATENT, generator=drawn), "std": torch.rand(LATENT, generator=drawn)})
    warm_up = 8 * WORKERS
    steps = sizes.entries // sizes.batch
    recipe = Recipe.model_validate(
        {
            "data": {
                "sources": [{"path": "x"}],
                "batch_size": sizes.batch,
                "workers": WORKERS,
                "cache": "disk",
            },
            "train": {"max_steps": warm_up + steps},
        }
    )
    records = Records([Record(f"{number}", "a picture", 0, 1, _unopened) for number in range(sizes.entries)])
    data = TrainingSet(records, recipe.data, 0)
    data.latents = DiskLatents(store, [[key] for key in keys])
    processes = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    loader = make_loader(data, recipe, processes)
    for _ in range(warm_up):
        next(loader)
    started = time.perf_counter()
    count = sum(len(batch.ids) for batches in loader for batch in batches)
    return count / (time.perf_counter() - started)


def _unopened() -> Image.Image:
    raise AssertionError("a cached picture was opened")
