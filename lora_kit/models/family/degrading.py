"""A picture → the low-resolution picture that super-resolution is to undo: blur, downscaling, noise, JPEG."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from lora_kit.models.family.picture_inputs import as_image
from lora_kit.recipe.degradation import DegradationSection, Kernel

KERNELS: dict[Kernel, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "hamming": Image.Resampling.HAMMING,
    "area": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}
_DRAWS = 7


def low_resolution(pixels: Tensor, factor: int, section: DegradationSection, generator: torch.Generator) -> Tensor:
    """pixels [3, H, W] in -1..1 → the low-resolution picture [3, H / factor, W / factor] in -1..1, fp32, on the CPU.

    Everything goes over 8-bit values, as in a file. The same numbers are drawn whatever the section asks for, so that
    a change of one step's strength moves no other. H and W are multiples of `factor`.
    """
    picture = as_image(pixels)
    small = degraded(picture, (picture.width // factor, picture.height // factor), section, generator)
    return as_pixels(small)


def degraded(
    picture: Image.Image, size: tuple[int, int], section: DegradationSection, generator: torch.Generator
) -> Image.Image:
    """The picture (mode RGB) blurred, scaled to `size` (width, height), noised and compressed as the section says."""
    kernel, blurs, deviation, noises, level, compresses, quality = torch.rand(
        _DRAWS, generator=generator, dtype=torch.float64
    ).tolist()
    field = torch.randn(size[1], size[0], 3, generator=generator, dtype=torch.float64)
    if section.blur is not None and blurs < section.blur_probability:
        picture = picture.filter(ImageFilter.GaussianBlur(_between(section.blur, deviation)))
    small = picture.resize(size, KERNELS[drawn_kernel(section, kernel)])
    if section.noise is not None and noises < section.noise_probability:
        noised = np.asarray(small).astype(np.float64) + _between(section.noise, level) * field.numpy()
        small = Image.fromarray(np.rint(noised).clip(0, 255).astype(np.uint8))
    if section.jpeg is not None and compresses < section.jpeg_probability:
        low, high = section.jpeg
        small = compressed(small, low + int(quality * (high - low + 1)))
    return small


def drawn_kernel(section: DegradationSection, place: float) -> Kernel:
    """The kernel at `place` in 0..1 of the weights laid end to end."""
    weighed: dict[Kernel, float] = {kernel: weight for kernel, weight in section.kernels.items() if weight}
    reached, total = 0.0, sum(weighed.values())
    for kernel, weight in weighed.items():
        reached += weight / total
        if place < reached:
            return kernel
    return list(weighed)[-1]  # the sum may end a rounding below 1


def compressed(picture: Image.Image, quality: int) -> Image.Image:
    """The picture as JPEG of this quality, decoded again."""
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def as_pixels(picture: Image.Image) -> Tensor:
    """A picture (mode RGB) → fp32 [3, height, width], each 8-bit value x as x / 127.5 - 1."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1.0)


def _between(bounds: tuple[float, float], place: float) -> float:
    return bounds[0] + place * (bounds[1] - bounds[0])
