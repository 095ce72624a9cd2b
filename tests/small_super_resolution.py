"""A small random LDM super-resolution pipeline in the real one's structure, and the real one's configs.

The published model is CompVis/ldm-super-resolution-4x-openimages, made from latent-diffusion's models/ldm/bsr_sr: its
config.yaml there says 160 channels × (1, 2, 2, 4), two residual blocks, attention at the eighth resolution in heads of
32 channels, six channels in and three out; a VQ first stage of factor 4 with 8192 codes of 3 channels; a schedule of
1000 steps from 0.0015 to 0.0155, linear in the square root.
"""

from __future__ import annotations

from typing import Any

import torch

REAL_UNET: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": 64,
    "in_channels": 6,
    "out_channels": 3,
    "block_out_channels": [160, 320, 320, 640],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 32,
    "norm_num_groups": 32,
}
REAL_VQVAE: dict[str, Any] = {
    "_class_name": "VQModel",
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "latent_channels": 3,
    "vq_embed_dim": 3,
    "num_vq_embeddings": 8192,
    "sample_size": 256,
}
SCHEDULE: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.0015,
    "beta_end": 0.0155,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
}


def small_super_resolution() -> Any:
    """The pipeline: two levels, attention in the deeper one, a first stage of factor 4."""
    from diffusers import DDIMScheduler, LDMSuperResolutionPipeline, UNet2DModel, VQModel

    torch.manual_seed(3)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=6,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )
    first_stage = VQModel(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=3,
        vq_embed_dim=3,
        num_vq_embeddings=64,
        norm_num_groups=8,
        sample_size=32,
    )
    # A fresh codebook lies within 1 / 64 of zero: every latent would decode to nearly the same picture.
    torch.nn.init.normal_(first_stage.quantize.embedding.weight)
    plain = {key: value for key, value in SCHEDULE.items() if not key.startswith("_")}
    return LDMSuperResolutionPipeline(vqvae=first_stage, unet=unet, scheduler=DDIMScheduler(**plain))
