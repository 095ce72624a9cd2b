"""Which part of a picture is trained, and its pixels at the bucket's size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lora_kit.data.buckets import Size

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in a picture's pixels."""


def covering_box(picture: Size, size: Size, across: float = 0.5, down: float = 0.5) -> Box:
    """The largest part of a picture that has the shape of `size`.

    `across` and `down` in 0..1 place it where the picture is wider or higher (0.5: centre). A part that already has
    `size` begins at a whole pixel, so that pixels can be taken as they are.
    """
    width, height = picture
    if width * size[1] <= height * size[0]:
        part = (width, width * size[1] / size[0])
    else:
        part = (height * size[0] / size[1], height)
    left, top = (width - part[0]) * across, (height - part[1]) * down
    if part == size:
        left, top = round(left), round(top)
    return (left, top, left + part[0], top + part[1])


def cut_picture(image: Image.Image, size: Size, across: float = 0.5, down: float = 0.5) -> Image.Image:
    """The `covering_box` of a picture, scaled to `size` by an antialiased Lanczos filter if it has another."""
    box = covering_box(image.size, size, across, down)
    left, top, right, bottom = map(round, box)
    if box == (left, top, right, bottom) and (right - left, bottom - top) == size:
        return image.crop((left, top, right, bottom))
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def pixels_of(image: Image.Image) -> Tensor:
    """A picture (mode RGB) as float32 [3, height, width] in -1..1: x / 127.5 - 1 of each 8-bit value x."""
    import torch  # here: what reads sizes alone starts without it

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1.0)
