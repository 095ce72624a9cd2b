"""A Stable Diffusion model's family by its UNet's config. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def fills_masks(unet: Mapping[str, Any]) -> bool:
    """Whether the UNet takes, behind the latents it gives back, a mask and as many channels of a masked picture."""
    latents = unet.get("out_channels")
    return bool(latents) and unet.get("in_channels") == 2 * int(latents) + 1


def family_name(unet: Mapping[str, Any]) -> str:
    """`sd1`, `sd2`, `sd1-inpainting` or `sd2-inpainting`, of a UNet that is known to be of one of them."""
    generation = "sd2" if unet.get("use_linear_projection") else "sd1"
    return f"{generation}-inpainting" if fills_masks(unet) else generation


PIPELINE_FAMILIES = {
    "LDMTextToImagePipeline": "ldm_text2im",
    "LDMSuperResolutionPipeline": "ldm_super_resolution",
}
"""Pipelines of one family, by their class in diffusers; what others hold, their UNet's config tells."""
