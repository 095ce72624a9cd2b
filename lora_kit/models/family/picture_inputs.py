"""Pictures that a sampler is given beside the prompt, and their way into tensors (as diffusers' VaeImageProcessor)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class PictureInputs:
    """What one picture is drawn from."""

    image: Image.Image
    """RGB."""
    mask: Image.Image | None = None
    """Mode L, in the image's size. White (128 and more) is drawn anew, black is kept."""


def image_pixels(inputs: Sequence[PictureInputs]) -> Tensor:
    """The images, float32 [b, 3, H, W] in -1..1, on the CPU. All have one size."""
    values = np.stack([np.asarray(one.image.convert("RGB"), dtype=np.float32) for one in inputs])
    return torch.from_numpy(values / np.float32(255)).permute(0, 3, 1, 2).contiguous() * 2 - 1


def mask_pixels(inputs: Sequence[PictureInputs]) -> Tensor:
    """The masks, float32 [b, 1, H, W], each pixel 0 or 1, on the CPU; all 1 where there is none."""
    masks = [one.mask or Image.new("L", one.image.size, 255) for one in inputs]
    values = np.stack([np.asarray(mask.convert("L"), dtype=np.float32) for mask in masks])
    return (torch.from_numpy(values / np.float32(255)) >= 0.5).float()[:, None]


def as_image(pixels: Tensor) -> Image.Image:
    """pixels [3, H, W] in -1..1 → 8-bit RGB: the inverse of x / 127.5 - 1, exact for what was made of 8-bit values."""
    levels = ((pixels.float().cpu() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def picture_inputs(pixels: Tensor, mask: Tensor) -> PictureInputs:
    """The way back: a picture [3, H, W] in -1..1 with its mask [1, H, W] of 0 and 1."""
    return PictureInputs(as_image(pixels), Image.fromarray((mask[0] * 255).byte().cpu().numpy()))
