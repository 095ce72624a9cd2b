"""How like two pictures are: PSNR and SSIM."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_kit.errors import DataError
from lora_kit.recipe.without_text import SSIM_WINDOW as WINDOW

_DEVIATION = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_LUMA = (0.299, 0.587, 0.114)
_LEAST_ERROR = 1 / 12
"""Mean squared error of rounding to 8 bits."""
Plane = NDArray[np.float64]


def psnr(picture: Image.Image, original: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB over all RGB values: 10 · log10(255² / mean squared error).

    An error below that of rounding to 8 bits counts as that, so that equal pictures have 58.9 dB and means stay finite.
    Raises DataError for pictures of different sizes.
    """
    _check_sizes(picture, original)
    error = float(np.mean((_values(picture) - _values(original)) ** 2))
    return 10 * math.log10(255**2 / max(error, _LEAST_ERROR))


def ssim(picture: Image.Image, original: Image.Image) -> float:
    """Mean structural similarity of the luma (Rec. 601), -1..1 (Wang et al. 2004, equations 13 to 17).

    Gaussian window of 11 × 11 pixels with deviation 1.5, K1 = 0.01, K2 = 0.03, over all places where the window lies
    wholly in the picture. Raises DataError for pictures of different sizes, or smaller than the window.
    """
    _check_sizes(picture, original)
    if min(picture.size) < WINDOW:
        size = f"{picture.width} × {picture.height}"
        raise DataError(f"SSIM looks at {WINDOW} × {WINDOW} pixels at once, and a picture has only {size}.")
    x, y = _values(picture) @ np.array(_LUMA), _values(original) @ np.array(_LUMA)
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x, variance_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return float(np.mean(likeness / ((mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2))))


def _check_sizes(picture: Image.Image, original: Image.Image) -> None:
    if picture.size != original.size:
        got, wanted = (f"{one.width} × {one.height}" for one in (picture, original))
        raise DataError(f"A picture of {got} pixels cannot be compared with one of {wanted}: scale one of them.")


def _values(picture: Image.Image) -> Plane:
    """[height, width, 3] in 0..255."""
    return np.asarray(picture.convert("RGB"), dtype=np.float64)


def _windowed(plane: Plane) -> Plane:
    """Gaussian-weighted mean of each window that lies in the plane [h, w] → [h - 10, w - 10]. The window is a product
    of one along each side."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _DEVIATION**2))
    weights /= weights.sum()
    rows = np.lib.stride_tricks.sliding_window_view(plane, WINDOW, axis=0) @ weights
    return np.lib.stride_tricks.sliding_window_view(rows, WINDOW, axis=1) @ weights
