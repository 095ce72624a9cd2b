"""Train the tiny base's AutoencoderKL on the OpenMoji pictures, then make its latents isotropic.

    python scripts/tiny_base/autoencoder.py --pictures data/openmoji --out runs/tiny-base/vae

64 x 64 pictures to 4 x 16 x 16 latents. The last step folds a 4 x 4 whitening matrix into the two 1 x 1
convolutions around the latent space, so that every latent channel has zero mean and unit variance over the
data and `scaling_factor` is 1. Without it colour sat in directions of deviation 0.09 beside others of 2.4,
and the diffusion, whose noise is the same in all directions, never learnt it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional as F

KL_WEIGHT = 1e-6  # per latent value; only keeps the latents bounded, the whitening sets their scale
CHROMA = torch.tensor([[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # Cb, Cr of R, G, B (ITU-R BT.601)


def load_pictures(folder: Path) -> torch.Tensor:
    """uint8 [n, 3, side, side] of every PNG below `folder`, in name order."""
    paths = sorted(folder.glob("*/*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1) for p in paths])


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
    )


def scaled(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float -1..1."""
    return pictures.float() / 127.5 - 1


def loss_of(vae: AutoencoderKL, batch: torch.Tensor) -> torch.Tensor:
    """Mean absolute + squared error over R, G, B, mean absolute error over Cb, Cr, and the KL divergence to a unit
    Gaussian (Kingma & Welling 2014, eq. 10). The chroma term is there because a flat area
    of a wrong hue is seen at once, and a softer stroke is not."""
    posterior = vae.encode(batch).latent_dist
    error = vae.decode(posterior.sample()).sample - batch
    chroma = torch.einsum("bchw,kc->bkhw", error, CHROMA)
    fidelity = error.abs().mean() + error.square().mean() + chroma.abs().mean()
    return fidelity + KL_WEIGHT * posterior.kl().mean()


def train(vae: AutoencoderKL, pictures: torch.Tensor, steps: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    started = time.monotonic()
    for step in range(1, steps + 1):
        batch = scaled(pictures[torch.randint(len(pictures), (batch_size,), generator=generator)])
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        loss = loss_of(vae, batch.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {seconds / step:.3f} s/step", flush=True)


@torch.no_grad()
def latent_means(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """float64 [n * h * w, 4] of the posterior means."""
    means = torch.cat([vae.encode(scaled(part)).latent_dist.mean for part in pictures.split(64)])
    return means.permute(0, 2, 3, 1).reshape(-1, means.shape[1]).double()


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Fold z' = W (z - mean), with W W^T the inverse covariance, into quant_conv and post_quant_conv.

    The decoder sees exactly what it saw before. The posterior's standard deviations cannot turn with a
    diagonal Gaussian: they become constants, a quarter of what has the same mean variance after the turn
    (the decoder is used to more, and clean latents are easier to learn).
    """
    channels = vae.config.latent_channels
    latents = latent_means(vae, pictures)
    mean, covariance = latents.mean(0), torch.cov(latents.T)
    values, vectors = torch.linalg.eigh(covariance)
    print(f"latent deviations along the axes before whitening: {[round(v, 3) for v in values.sqrt().tolist()]}")
    forward = (vectors / values.sqrt()) @ vectors.T
    backward = (vectors * values.sqrt()) @ vectors.T

    quant, post = vae.quant_conv, vae.post_quant_conv
    variances = torch.cat([vae.encode(scaled(part)).latent_dist.var for part in pictures[:512].split(64)])
    turned = forward.square() @ variances.mean((0, 2, 3)).double()
    weight, bias = quant.weight[:channels, :, 0, 0].double(), quant.bias[:channels].double()
    quant.weight[:channels, :, 0, 0] = (forward @ weight).float()
    quant.bias[:channels] = (forward @ (bias - mean)).float()
    quant.weight[channels:] = 0
    quant.bias[channels:] = (turned / 16).log().float()
    weight = post.weight[:, :, 0, 0].double()
    post.bias += (weight @ mean).float()
    post.weight[:, :, 0, 0] = (weight @ backward).float()


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Decibels, peak 2 (pixels run from -1 to 1), of decode(mean of encode)."""
    errors = [
        F.mse_loss(vae.decode(vae.encode(scaled(part)).latent_dist.mean).sample.clamp(-1, 1), scaled(part)).item()
        for part in pictures.split(64)
    ]
    return float(10 * np.log10(4 / np.mean(errors)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("data/openmoji"))
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-base/vae"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    pictures = load_pictures(arguments.pictures)
    pictures = pictures[torch.randperm(len(pictures))]
    held_out, pictures = pictures[:128], pictures[128:]
    vae = new_autoencoder().to(memory_format=torch.channels_last)
    train(vae, pictures, arguments.steps, arguments.batch_size)
    vae.eval()
    before = psnr(vae, held_out)
    whiten(vae, pictures)
    latents = latent_means(vae, pictures)
    report = {
        "psnr_held_out_db": round(psnr(vae, held_out), 2),
        "psnr_before_whitening_db": round(before, 2),
        "latent_mean": [round(v, 4) for v in latents.mean(0).tolist()],
        "latent_std": [round(v, 4) for v in latents.std(0).tolist()],
    }
    print(json.dumps(report))
    vae.to(memory_format=torch.contiguous_format).save_pretrained(arguments.out)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
