"""PSNR and SSIM against their definitions, written out window by window."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from lora_kit.errors import DataError
from lora_kit.training.validation.likeness import psnr, ssim


def noise_picture(seed: int, size: tuple[int, int] = (24, 17)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def smooth_pair() -> tuple[Image.Image, Image.Image]:
    """A ramp, and the same with a few levels of noise: SSIM well inside 0..1."""
    down, across = np.mgrid[0:19, 0:23]
    ramp = np.stack([10 * across, 12 * down, 5 * (across + down)], axis=-1).clip(0, 255)
    off = np.random.default_rng(5).integers(-20, 21, ramp.shape)
    return Image.fromarray(ramp.astype(np.uint8)), Image.fromarray((ramp + off).clip(0, 255).astype(np.uint8))


def ssim_by_windows(one: Image.Image, other: Image.Image) -> float:
    """Equation 13 of Wang et al. 2004 at each place, from a two-dimensional window and centred moments."""
    planes = []
    for picture in (one, other):
        red, green, blue = (np.asarray(picture, dtype=np.float64)[..., channel] for channel in range(3))
        planes.append(0.299 * red + 0.587 * green + 0.114 * blue)
    down, across = np.mgrid[-5:6, -5:6]
    window = np.exp(-(down**2 + across**2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for top in range(planes[0].shape[0] - 10):
        for left in range(planes[0].shape[1] - 10):
            x, y = (plane[top : top + 11, left : left + 11] for plane in planes)
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            variances = (window * (x - mean_x) ** 2).sum() + (window * (y - mean_y) ** 2).sum()
            covariance = (window * (x - mean_x) * (y - mean_y)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
            found.append(luminance * (2 * covariance + c2) / (variances + c2))
    return float(np.mean(found))


@pytest.mark.parametrize("pair", [(noise_picture(0), noise_picture(1)), smooth_pair()], ids=["noise", "ramp"])
def test_ssim_is_the_papers_at_every_window(pair: tuple[Image.Image, Image.Image]) -> None:
    # Moments about 0 lose at most 255² · 2^-52 · some 121 terms, against C2 = 58.5.
    assert ssim(*pair) == pytest.approx(ssim_by_windows(*pair), abs=1e-9)
    assert -1 < ssim(*pair) < 0.99


def test_a_picture_is_wholly_like_itself() -> None:
    picture = noise_picture(2)
    assert ssim(picture, picture) == pytest.approx(1, abs=1e-12)
    assert psnr(picture, picture) == pytest.approx(10 * math.log10(255**2 * 12))


def test_psnr_is_that_of_the_mean_squared_error() -> None:
    one = np.full((11, 11, 3), 100, dtype=np.uint8)
    other = one.copy()
    other[..., 0] += 6  # 36 in one of three channels: mean squared error 12
    expected = 20 * math.log10(255) - 10 * math.log10(12)
    assert psnr(Image.fromarray(one), Image.fromarray(other)) == pytest.approx(expected)
    # 8-bit values must not wrap: 0 against 255 is the largest error there is.
    black, white = (Image.new("RGB", (11, 11), (level,) * 3) for level in (0, 255))
    assert psnr(black, white) == pytest.approx(0)


def test_other_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="24 × 17 pixels cannot be compared with one of 17 × 24"):
        psnr(noise_picture(0), noise_picture(0, (17, 24)))
    with pytest.raises(DataError, match=r"11 × 11 pixels at once, and a picture has only 10 × 12"):
        ssim(noise_picture(0, (10, 12)), noise_picture(1, (10, 12)))
