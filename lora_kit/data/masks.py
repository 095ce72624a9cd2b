"""Masks: what each part of a picture counts in the loss. White (255) counts, black does not."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_kit.data.buckets import Size
from lora_kit.data.crops import Box


def mask_cells(mask: Image.Image, box: Box, size: Size, factor: int) -> Tensor:
    """The part of a mask (mode L) in `box`, averaged over each latent cell's area: float32 [h, w] in 0..1.

    size: width and height that the picture's own `box` is scaled to, pixels; factor: pixels of a cell's side.
    """
    width, height = size
    cells = mask.convert("F").resize((width // factor, height // factor), Image.Resampling.BOX, box=box)
    # The filter's weights sum to 1 within rounding only.
    return torch.from_numpy(np.asarray(cells, dtype=np.float32) / np.float32(255)).clamp_(0, 1)


def joined_mask(alpha: Image.Image | None, own: Image.Image | None) -> Image.Image | None:
    """One mask (mode L) from a picture's alpha and its mask file, where there are both: their product."""
    if alpha is None or own is None:
        return own if alpha is None else alpha
    product = np.asarray(alpha, dtype=np.float32) * np.asarray(own, dtype=np.float32) / 255
    return Image.fromarray(np.rint(product).astype(np.uint8))
