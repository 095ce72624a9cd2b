"""What start.py compares with: the imports and the first step of a plain diffusers + PEFT loop.

    python scripts/bench/start_plain.py BASE PICTURES OUT        BASE --imports: nothing but those

The imports are those of diffusers' examples/text_to_image/train_text_to_image_lora.py but torchvision, which is no
dependency here. BASE: a diffusers folder; PICTURES: a folder with metadata.jsonl, 64 px; a line is written to
OUT/metrics.jsonl after the first step. Batch 16, rank 16 on the attention, as that example targets it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets  # noqa: F401
import numpy as np
import torch
import transformers  # noqa: F401
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,  # noqa: F401
    StableDiffusionPipeline,  # noqa: F401
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params, compute_snr  # noqa: F401
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict  # noqa: F401
from PIL import Image
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

BATCH = 16


def first_step(base: str, pictures: Path) -> float:
    """The loss of one step, as the example makes it."""
    accelerator = Accelerator()
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    for network in (unet, vae, text_encoder):
        network.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    rate = get_scheduler("constant", optimizer=optimizer)
    unet, optimizer, rate = accelerator.prepare(unet, optimizer, rate)
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()[:BATCH]]
    images = [Image.open(pictures / line["file_name"]).convert("RGB") for line in lines]
    pixels = np.stack([np.asarray(image, dtype=np.float32) / 127.5 - 1 for image in images])
    captions = [line["text"] for line in lines]
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    latents = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).latent_dist.sample() * vae.config.scaling_factor
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (BATCH,))
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, text_encoder(tokens, return_dict=False)[0], return_dict=False)[0]
    loss = functional.mse_loss(predicted.float(), noise.float())
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    rate.step()
    return loss.item()


if __name__ == "__main__":
    base, pictures, out = sys.argv[1:]
    said = {"imported": True} if base == "--imports" else {"step": 1, "loss": first_step(base, Path(pictures))}
    (Path(out) / "metrics.jsonl").write_text(json.dumps(said) + "\n")
