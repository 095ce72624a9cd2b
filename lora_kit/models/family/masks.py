"""Masks drawn at random: what an inpainting model is asked to fill while it is trained.

As the masks that latent diffusion's inpainting was trained with (Suvorov et al. 2022, "LaMa", section 2.3: large
rectangles and thick strokes), and with a part of the pictures masked wholly, as Stable Diffusion's was.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lora_kit.recipe.inpainting import InpaintingSection


def mask_for(section: InpaintingSection, hole: Tensor | None, size: tuple[int, int], chance: torch.Generator) -> Tensor:
    """What is filled of one picture: float32 [1, H, W], each pixel 0 or 1 (filled), on the CPU.

    hole: [1, H, W] in 0..1, what the data says; None: drawn. size: (height, width). All draws come from `chance`.
    """
    if _uniform(chance) < section.whole:
        return torch.ones(1, *size)
    return drawn_mask(section, size, chance) if hole is None else (hole.cpu() >= 0.5).float()


def drawn_mask(section: InpaintingSection, size: tuple[int, int], chance: torch.Generator) -> Tensor:
    """Rectangles or one stroke on a picture of `size` (height, width): float32 [1, H, W], 1 is filled."""
    height, width = size
    canvas = Image.new("1", (width, height))
    shapes = section.shapes
    rectangles = _uniform(chance) * (shapes.rectangles + shapes.strokes) < shapes.rectangles
    count = 1 + int(_uniform(chance) * section.most)
    pen = ImageDraw.Draw(canvas)
    if rectangles:
        for _ in range(count):
            _rectangle(pen, section, (width, height), chance)
    else:
        _stroke(pen, section, (width, height), count, chance)
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32).copy())[None]


def _rectangle(
    pen: ImageDraw.ImageDraw, section: InpaintingSection, size: tuple[int, int], chance: torch.Generator
) -> None:
    """All of it within the picture."""
    low: list[int] = []
    high: list[int] = []
    for pixels in size:
        side = max(1, round(pixels * _between(section.smallest, section.largest, chance)))
        first = int(_uniform(chance) * (pixels - side + 1))
        low, high = [*low, first], [*high, first + side - 1]
    pen.rectangle((low[0], low[1], high[0], high[1]), fill=1)


def _stroke(
    pen: ImageDraw.ImageDraw, section: InpaintingSection, size: tuple[int, int], pieces: int, chance: torch.Generator
) -> None:
    """Begins within the picture, and may leave it."""
    shorter = min(size)
    thick = max(1, round(shorter * _between(section.stroke_width / 4, section.stroke_width, chance)))
    x, y = (_uniform(chance) * pixels for pixels in size)
    _dot(pen, x, y, thick)
    for _ in range(pieces):
        length = shorter * _between(section.smallest, section.largest, chance)
        angle = 2 * math.pi * _uniform(chance)
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        pen.line((x, y, *end), fill=1, width=thick)
        x, y = end
        _dot(pen, x, y, thick)


def _dot(pen: ImageDraw.ImageDraw, x: float, y: float, thick: int) -> None:
    reach = thick / 2
    pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=1)


def _between(low: float, high: float, chance: torch.Generator) -> float:
    return low + (high - low) * _uniform(chance)


def _uniform(chance: torch.Generator) -> float:
    """0..1, without 1."""
    return float(torch.rand((), generator=chance, dtype=torch.float64))
