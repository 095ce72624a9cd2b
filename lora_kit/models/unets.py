"""The denoising network's class: with cross-attention to text, or without text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel

UNet = UNet2DConditionModel | UNet2DModel


def unet_class(config: Mapping[str, Any]) -> type[UNet2DConditionModel] | type[UNet2DModel]:
    """diffusers' class for a config.json."""
    return UNet2DModel if config.get("_class_name") == "UNet2DModel" else UNet2DConditionModel
