"""The first stage of latent diffusion: a KL- or a VQ-regularised autoencoder (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from lora_kit.errors import ModelError
from lora_kit.models.bundle import FirstStage, ModelBundle

_CLASSES: dict[str, type[AutoencoderKL] | type[VQModel]] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
FIRST_STAGES = tuple(_CLASSES)
"""What diffusers calls them, in model_index.json and config.json."""


def first_stage_class(config: Mapping[str, Any], source: str) -> type[AutoencoderKL] | type[VQModel]:
    """diffusers' class for a config.json, AutoencoderKL where it names none. Raises ModelError for any other."""
    name = config.get("_class_name", "AutoencoderKL")
    if name not in _CLASSES:
        raise ModelError(
            f"{source}: its first stage is a {name}; supported are {' and '.join(FIRST_STAGES)}. Give the autoencoder "
            "that the UNet was trained with."
        )
    return _CLASSES[name]


ENCODED_PIXELS = 256 * 256
"""As many go through the encoder at once, or one picture. At SD's size eight pictures of 512 x 512 together take more
than 5 GiB, the most that a whole run would hold; on a CPU they are no faster together (5.5 CPU seconds for eight of 128
x 128 one by one, 6.2 together)."""


def encode(vae: FirstStage, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """pixels [b, 3, H, W] in -1..1 → mean and standard deviation of the latents [b, c, h, w], unscaled fp32.

    Of a VQModel the latents before quantisation, with deviation 0: the diffusion is trained on those, and what is
    decoded is quantised (the paper's section 3.1 counts the quantisation to the decoder).
    Runs in the first stage's own precision even inside autocast: SD's overflows in fp16.
    """
    at_once = max(1, ENCODED_PIXELS // (pixels.shape[-1] * pixels.shape[-2]))
    if len(pixels) <= at_once:
        return _encode(vae, pixels)
    means, deviations = zip(*(_encode(vae, part) for part in pixels.split(at_once)), strict=True)
    return torch.cat(means), torch.cat(deviations)


def _encode(vae: FirstStage, pixels: Tensor) -> tuple[Tensor, Tensor]:
    network: Any = vae
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        encoded = network.encode(pixels.to(network.dtype))
    if isinstance(vae, VQModel):
        mean = encoded.latents.float()
        return mean, torch.zeros_like(mean)
    posterior = encoded.latent_dist
    return posterior.mean.float(), posterior.std.float()


def decode(vae: FirstStage, latents: Tensor, scaled_by: tuple[float, float] | None = None) -> Tensor:
    """Scaled latents [b, c, h, w] → pixels [b, 3, H, W], nearly in -1..1, fp32. A VQModel quantises them first.

    scaled_by: as `Family.latent_scale` gives it. Default: as the config says.
    """
    network: Any = vae
    scale, shift = scaled_by or latent_scale(vae)
    return network.decode((latents / scale + shift).to(network.dtype)).sample.float()


def latent_scale(vae: FirstStage) -> tuple[float, float]:
    """(scaling_factor, shift_factor) of the first stage's config; a missing shift is 0."""
    config: Any = vae.config
    return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)


def latent_channels(vae: FirstStage) -> int:
    """Channels of the latents that the diffusion sees. A VQModel's are those of its codebook's vectors."""
    config: Any = vae.config
    return int(getattr(config, "vq_embed_dim", None) or config.latent_channels)


def vae_factor(bundle: ModelBundle) -> int:
    """Pixels per latent cell, along one side."""
    config: Any = bundle.vae.config
    return 2 ** (len(config.block_out_channels) - 1)
