"""What a user would run: LoRA on Stable Diffusion as diffusers' example trains it, with PEFT's layers or LyCORIS'.

    python scripts/bench/job/plain.py SETTINGS.json

Pictures are decoded, and VAE and text encoder run, in every step. Beside the adapter it writes steps.json: when each
step ended (seconds of the system's monotonic clock), its loss, and how many numbers were trained. Of lora_kit it uses
nothing.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, CLIPTokenizer

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
Adapter = tuple[list[nn.Parameter], Callable[[Path], None]]
"""What is trained, and what saves it in a folder."""


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    set_seed(job.seed)
    accelerator = Accelerator(mixed_precision=job.autocast, cpu=True)
    frozen = torch.bfloat16 if job.frozen == "bf16" else torch.float32
    vae = AutoencoderKL.from_pretrained(job.base, subfolder="vae", torch_dtype=frozen).requires_grad_(False)
    text = CLIPTextModel.from_pretrained(job.base, subfolder="text_encoder", dtype=frozen).requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(job.base, subfolder="unet", torch_dtype=frozen).requires_grad_(False)
    noise = DDPMScheduler.from_pretrained(job.base, subfolder="scheduler")
    weights, save = {"peft": peft_adapter, "lycoris": lycoris_adapter}[job.method](unet, job)
    optimizer = torch.optim.AdamW(weights, lr=job.lr)
    rate = get_scheduler(job.schedule, optimizer, num_warmup_steps=job.warmup, num_training_steps=job.steps)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, make_loader(job), rate)
    unet.train()
    steps: dict[str, Any] = {"ends": [], "losses": [], "trained": sum(weight.numel() for weight in weights)}
    for pixels, tokens in endless(loader, job.steps):
        with torch.no_grad(), accelerator.autocast():
            latents = vae.encode(pixels.to(frozen)).latent_dist.sample() * vae.config.scaling_factor
            states = text(tokens, return_dict=False)[0]
        added = torch.randn_like(latents)
        times = torch.randint(0, noise.config.num_train_timesteps, (len(latents),)).long()
        wanted = added if noise.config.prediction_type == "epsilon" else noise.get_velocity(latents, added, times)
        predicted = unet(noise.add_noise(latents, added, times), times, states, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), wanted.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(weights, job.max_grad_norm)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        steps["losses"].append(loss.detach().item())
        steps["ends"].append(time.monotonic())
    save(Path(job.out))
    (Path(job.out) / "steps.json").write_text(json.dumps(steps))


def target_names(unet: nn.Module, targets: str) -> list[str]:
    """Linear layers and convolutions, by their full names: the attention's projections, or all."""
    kinds = (nn.Linear, nn.Conv2d)
    names = [name for name, module in unet.named_modules() if isinstance(module, kinds)]
    if targets == "attention":
        return [name for name in names if ".attn" in name and name.endswith(tuple(ATTENTION))]
    return names


def peft_adapter(unet: Any, job: SimpleNamespace) -> Adapter:
    targets = ATTENTION if job.targets == "attention" else target_names(unet, job.targets)
    unet.add_adapter(LoraConfig(r=job.rank, lora_alpha=job.rank, target_modules=targets))
    cast_training_params(unet, dtype=torch.float32)  # of a bf16 network PEFT's weights would be bf16, and learn worse

    def save(out: Path) -> None:
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=layers, weight_name="adapter.safetensors")

    return [weight for weight in unet.parameters() if weight.requires_grad], save


def lycoris_adapter(unet: nn.Module, job: SimpleNamespace) -> Adapter:
    from lycoris import LycorisNetwork, create_lycoris

    patterns = [name.replace(".", r"\.") + "$" for name in target_names(unet, job.targets)]
    LycorisNetwork.apply_preset({"target_module": [], "target_name": patterns})
    network = create_lycoris(unet, 1.0, linear_dim=job.rank, linear_alpha=job.rank, algo="lora", preset="full")
    network.apply_to()
    network.train().requires_grad_(True)
    assert len(network.loras) == len(patterns)
    return list(network.parameters()), lambda out: network.save_weights(str(out / "adapter.safetensors"), None, {})


def make_loader(job: SimpleNamespace) -> DataLoader[Any]:
    """Shuffled batches of pixels [b, 3, h, w] in -1..1 and token ids [b, tokens], decoded as they are asked for."""
    tokenizer: Any = CLIPTokenizer.from_pretrained(job.base, subfolder="tokenizer")
    found = datasets.load_dataset("imagefolder", data_dir=job.pictures, cache_dir=f"{job.out}/datasets", split="train")

    def transformed(rows: dict[str, list[Any]]) -> dict[str, list[Tensor]]:
        captions = ["" if random.random() < job.caption_dropout else caption for caption in rows["text"]]
        options = {"max_length": tokenizer.model_max_length, "padding": "max_length", "truncation": True}
        tokens = tokenizer(captions, return_tensors="pt", **options).input_ids
        return {"pixels": [pixels_of(image, job.resolution) for image in rows["image"]], "tokens": list(tokens)}

    def collate(rows: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([row["pixels"] for row in rows]), torch.stack([row["tokens"] for row in rows])

    rows: Any = found.with_transform(transformed)
    return DataLoader(rows, batch_size=job.batch_size, shuffle=True, collate_fn=collate, drop_last=True)


def pixels_of(image: Image.Image, resolution: int) -> Tensor:
    square = ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


def endless(loader: DataLoader[Any], steps: int) -> Iterator[Any]:
    """Epoch after epoch, `steps` batches in all."""
    done = 0
    while done < steps:
        for batch in loader:
            yield batch
            done += 1
            if done == steps:
                return


if __name__ == "__main__":
    main()
