"""Masks: what each part of a picture counts in the loss. White (255) counts, black does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_kit.data.buckets import Size
from lora_kit.data.crops import Box

if TYPE_CHECKING:
    from torch import Tensor


def mask_cells(mask: Image.Image, box: Box, size: Size, factor: int) -> Tensor:
    """The part of a mask (mode L) in `box`, averaged over each latent cell's area: float32 [h, w] in 0..1.

    size: width and height that the picture's own `box` is scaled to, pixels; factor: pixels of a cell's side. A pixel
    that a cell covers in part counts in part; Pillow's box filter would take it wholly or not at all.
    """
    import torch  # here, as in `pixels_of`

    values = np.asarray(mask, dtype=np.float32) / np.float32(255)
    across = _shares(box[0], box[2], size[0] // factor, mask.width)
    down = _shares(box[1], box[3], size[1] // factor, mask.height)
    return torch.from_numpy(down @ values @ across.T).clamp_(0, 1)


def _shares(low: float, high: float, cells: int, pixels: int) -> NDArray[np.float32]:
    """float32 [cells, pixels]: what share of each of the equal cells between two places each pixel takes."""
    edges = np.linspace(low, high, cells + 1)
    place = np.arange(pixels)
    covered = np.minimum(edges[1:, None], place + 1) - np.maximum(edges[:-1, None], place)
    return (covered.clip(0) * (cells / (high - low))).astype(np.float32)


def joined_mask(alpha: Image.Image | None, own: Image.Image | None) -> Image.Image | None:
    """One mask (mode L) from a picture's alpha and its mask file, where there are both: their product."""
    if alpha is None or own is None:
        return own if alpha is None else alpha
    product = np.asarray(alpha, dtype=np.float32) * np.asarray(own, dtype=np.float32) / 255
    return Image.fromarray(np.rint(product).astype(np.uint8))
