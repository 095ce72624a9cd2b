"""Make a tiny LDM super-resolution model to be trained: a VQ first stage from pictures, and a fresh UNet2DModel.

    python scripts/tiny_base/openmoji.py --out data/openmoji                    # the pictures, 64 x 64
    python scripts/ldm/superres.py --pictures data/openmoji/color --out runs/ldm-superres/fresh
    accelerate launch scripts/train_lora.py scripts/ldm/superres_base.yaml      # the UNet, on bicubic pairs
    accelerate launch scripts/train_lora.py scripts/ldm/superres_lora.yaml      # a LoRA: noisy pictures

In the structure of CompVis/ldm-super-resolution-4x-openimages: 64 x 64 pixels to 3 x 16 x 16 latents, six channels in
and three out. Pictures of kind `food` are seen by none of the four: the recipes hold them out.

The first stage is trained without its codebook; then its latents are turned to zero mean and unit variance (diffusers'
pipeline scales them by nothing), the codebook is laid among them by k-means, and the decoder learns to live with it.
Three channels learn hue last (700 steps are too few), and what the decoder cannot give back no UNet can.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, LDMSuperResolutionPipeline, UNet2DModel, VQModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

HELD_OUT = "food"
CODES = 1024
CHROMA = torch.tensor([[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # Cb, Cr of R, G, B (ITU-R BT.601)


def load_pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """uint8 [n, 3, 64, 64] of the pictures to train on, and of the held-out ones."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]

    def stacked(held_out: bool) -> Tensor:
        names = [row["file_name"] for row in rows if (row["kind"] == HELD_OUT) == held_out]
        values = np.stack([np.asarray(Image.open(folder / name).convert("RGB")) for name in names])
        return torch.from_numpy(values).permute(0, 3, 1, 2)

    return stacked(False), stacked(True)


def new_first_stage() -> VQModel:
    return VQModel(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=3,
        vq_embed_dim=3,
        num_vq_embeddings=CODES,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
    )


def new_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=3,
        block_out_channels=(48, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """The published model's schedule."""
    return DDIMScheduler(beta_start=0.0015, beta_end=0.0155, beta_schedule="scaled_linear", clip_sample=False)


def scaled(pictures: Tensor) -> Tensor:
    """uint8 0..255 to float -1..1."""
    return pictures.float() / 127.5 - 1


def fidelity(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Mean absolute and squared error over R, G, B, and mean absolute error over Cb, Cr."""
    error = decoded - pictures
    chroma = torch.einsum("bchw,kc->bkhw", error, CHROMA)
    return error.abs().mean() + error.square().mean() + chroma.abs().mean()


def train(first_stage: VQModel, pictures: Tensor, steps: int, quantised: bool) -> None:
    """Without the codebook all of it; with it the decoder alone, so that the latents stay where they are."""
    generator = torch.Generator().manual_seed(int(quantised))
    trained = [*first_stage.post_quant_conv.parameters(), *first_stage.decoder.parameters()]
    trained += [] if quantised else [*first_stage.encoder.parameters(), *first_stage.quant_conv.parameters()]
    rate = 5e-4 if quantised else 2e-3
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    started = time.monotonic()
    for step in range(1, steps + 1):
        batch = scaled(pictures[torch.randint(len(pictures), (8,), generator=generator)])
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(not quantised):
            latents = first_stage.encode(batch).latents
        decoded = first_stage.decode(latents, force_not_quantize=not quantised).sample
        # Without a codebook nothing else keeps the latents bounded.
        loss = fidelity(decoded, batch) + 1e-4 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = (time.monotonic() - started) / step
            print(
                f"{'codebook' if quantised else 'autoencoder'} {step}/{steps}  {loss:.4f}  {seconds:.3f} s", flush=True
            )


@torch.no_grad()
def latents_of(first_stage: VQModel, pictures: Tensor) -> Tensor:
    """float64 [n * h * w, 3]."""
    found = torch.cat([first_stage.encode(scaled(part)).latents for part in pictures.split(64)])
    return found.permute(0, 2, 3, 1).reshape(-1, found.shape[1]).double()


@torch.no_grad()
def whiten(first_stage: VQModel, pictures: Tensor) -> None:
    """Fold z' = W (z - mean), with W W^T the inverse covariance, into quant_conv and its inverse into
    post_quant_conv: without the codebook the decoder sees exactly what it saw before."""
    latents = latents_of(first_stage, pictures)
    mean = latents.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(latents.T))
    forward, backward = (vectors / values.sqrt()) @ vectors.T, (vectors * values.sqrt()) @ vectors.T
    quant, post = first_stage.quant_conv, first_stage.post_quant_conv
    weight, bias = quant.weight[:, :, 0, 0].double(), quant.bias.double()
    quant.weight[:, :, 0, 0] = (forward @ weight).float()
    quant.bias.copy_((forward @ (bias - mean)).float())
    weight = post.weight[:, :, 0, 0].double()
    post.bias += (weight @ mean).float()
    post.weight[:, :, 0, 0] = (weight @ backward).float()


@torch.no_grad()
def lay_codebook(first_stage: VQModel, pictures: Tensor, rounds: int = 20) -> float:
    """k-means (Lloyd's) of the latents; the root mean square distance to the nearest code."""
    latents = latents_of(first_stage, pictures).float()
    generator = torch.Generator().manual_seed(0)
    # White paper is half of all latents: codes are laid among the different ones.
    latents = torch.unique((latents * 64).round(), dim=0)[:, :] / 64
    latents = latents[torch.randperm(len(latents), generator=generator)[:40000]]
    codes = latents[:CODES].clone()
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, codes).argmin(1) for part in latents.split(4096)])
        sums = torch.zeros_like(codes).index_add_(0, nearest, latents)
        counts = torch.bincount(nearest, minlength=CODES)[:, None]
        codes = torch.where(counts > 0, sums / counts.clamp(min=1), codes)
    first_stage.quantize.embedding.weight.copy_(codes)
    distances = torch.cat([torch.cdist(part, codes).min(1).values for part in latents.split(4096)])
    return float(distances.square().mean().sqrt())


@torch.no_grad()
def psnr(first_stage: VQModel, pictures: Tensor, quantised: bool) -> float:
    """Mean over pictures of the decoded ones' PSNR, dB: what super-resolution cannot pass."""
    scores: list[float] = []
    for part in pictures.split(64):
        latents = first_stage.encode(scaled(part)).latents
        decoded = first_stage.decode(latents, force_not_quantize=not quantised).sample.clamp(-1, 1)
        errors = F.mse_loss(decoded, scaled(part), reduction="none").mean((1, 2, 3))
        scores += (10 * torch.log10(4 / errors)).tolist()
    return round(float(np.mean(scores)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("data/openmoji/color"))
    parser.add_argument("--out", type=Path, default=Path("runs/ldm-superres/fresh"))
    parser.add_argument("--steps", type=int, default=4000, help="of the autoencoder; the codebook has a quarter")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    pictures, held_out = load_pictures(arguments.pictures)
    first_stage = new_first_stage().to(memory_format=torch.channels_last)
    train(first_stage, pictures, arguments.steps, quantised=False)
    whiten(first_stage, pictures)
    report = {"psnr_without_codebook": psnr(first_stage, held_out, quantised=False)}
    report["code_distance"] = round(lay_codebook(first_stage, pictures), 4)
    report["psnr_before_tuning"] = psnr(first_stage, held_out, quantised=True)
    train(first_stage, pictures, arguments.steps // 4, quantised=True)
    report["psnr_held_out"] = psnr(first_stage, held_out, quantised=True)
    unet = new_unet()
    print(json.dumps(report), f"UNet {unet.num_parameters() / 1e6:.2f} M")
    first_stage.to(memory_format=torch.contiguous_format)
    pipeline = LDMSuperResolutionPipeline(vqvae=first_stage.eval(), unet=unet, scheduler=new_scheduler())
    pipeline.save_pretrained(arguments.out)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
