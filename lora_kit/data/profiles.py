"""Embedded ICC profiles: colours become sRGB, which Stable Diffusion's pictures are in."""

from __future__ import annotations

import struct
from functools import lru_cache
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

# Two profiles that are both called sRGB differ by rounding; the nearest other space in use, Adobe RGB, by over 60.
_SAME_LEVELS = 3
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_BROKEN = (ImageCms.PyCMSError, OSError, ValueError, TypeError, struct.error)


class _Conversion(NamedTuple):
    mode: str
    """Of the pictures that it takes."""
    transform: ImageCms.ImageCmsTransform | None
    """None: the profile is sRGB."""


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """An image of mode L, RGB or CMYK as sRGB (perceptual intent), and a note if the profile cannot be used.

    Where the profile is sRGB itself, RGB values stay bit for bit.
    """
    try:
        conversion = _conversion(profile)
        if conversion.transform is None:
            return image.convert("RGB"), ""
        fitting = _fit(image, conversion.mode)
        converted = ImageCms.applyTransform(fitting, conversion.transform)
    except _BROKEN as error:
        return image.convert("RGB"), f"its colour profile cannot be used ({error}); its numbers are taken as sRGB"
    assert converted is not None
    return converted, ""


@lru_cache(maxsize=32)
def _conversion(profile: bytes) -> _Conversion:
    """Kept, as the pictures of a set mostly share a profile and building a transform takes longer than using it."""
    opened = ImageCms.ImageCmsProfile(BytesIO(profile))
    space = opened.profile.xcolor_space.strip()  # pyright: ignore[reportAttributeAccessIssue] (stub: a file instead)
    if space not in _MODES:
        raise ValueError(f"it is for {space} colours")
    mode = _MODES[space]
    transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    return _Conversion(mode, None if mode == "RGB" and _changes_little(transform) else transform)


def _changes_little(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a grid over all of RGB comes out as it went in: names of profiles say nothing reliable."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(9, 81, 3)
    through = ImageCms.applyTransform(Image.fromarray(grid), transform)
    return bool(np.abs(np.asarray(through).astype(int) - grid).max() <= _SAME_LEVELS)


def _fit(image: Image.Image, mode: str) -> Image.Image:
    """The image in the profile's mode, where that loses nothing."""
    if image.mode == mode:
        return image
    # Grey saved with the profile of the RGB picture it was; or grey in RGB, as a palette or alpha leaves it here.
    is_grey = image.mode == "L" or (image.mode == "RGB" and _is_grey(image))
    if {image.mode, mode} == {"L", "RGB"} and is_grey:
        return image.convert(mode)
    raise ValueError(f"it is for {mode} pictures, this is {image.mode}")


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = image.split()
    return red.tobytes() == green.tobytes() == blue.tobytes()
