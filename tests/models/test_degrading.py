"""Low-resolution pictures: each step of the degradation against what it says it is."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_kit.models.family.degrading import as_pixels, drawn_kernel, low_resolution
from lora_kit.models.family.picture_inputs import as_image
from lora_kit.recipe.degradation import DegradationSection


@pytest.fixture
def pixels() -> torch.Tensor:
    """A picture [3, 16, 24] of 8-bit values, smooth enough that kernels differ by more than rounding."""
    down, across = np.mgrid[0:16, 0:24]
    waves = np.stack([np.sin(across / 2), np.cos(down / 3), np.sin((across + down) / 4)], axis=-1)
    return as_pixels(Image.fromarray((127.5 + 120 * waves).round().astype(np.uint8)))


def low(pixels: torch.Tensor, seed: int = 0, **fields: Any) -> torch.Tensor:
    section = DegradationSection.model_validate(fields)
    return low_resolution(pixels, 4, section, torch.Generator().manual_seed(seed))


def test_pictures_and_pixels_are_each_others_inverse() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(np.asarray(as_image(as_pixels(Image.fromarray(levels)))), levels)


def test_the_default_is_bicubic(pixels: torch.Tensor) -> None:
    expected = as_image(pixels).resize((6, 4), Image.Resampling.BICUBIC)
    assert torch.equal(low(pixels), as_pixels(expected))
    assert low(pixels).shape == (3, 4, 6)


def test_area_is_the_mean_of_the_pixels_that_become_one(pixels: torch.Tensor) -> None:
    exact = pixels.double().reshape(3, 4, 4, 6, 4).mean(dim=(2, 4))
    # Pillow goes along one side and then the other, and rounds to 8 bits each time.
    assert (low(pixels, kernels={"area": 1}).double() - exact).abs().max() <= 1 / 127.5 + 1e-6


def test_kernels_come_up_as_often_as_their_weights_say() -> None:
    section = DegradationSection(kernels={"bicubic": 2, "nearest": 0, "area": 1, "lanczos": 1})
    places = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = [drawn_kernel(section, place) for place in places.tolist()]
    assert {name: drawn.count(name) for name in section.kernels} == {
        "bicubic": 2000,
        "nearest": 0,
        "area": 1000,
        "lanczos": 1000,
    }


def test_blur_lessens_what_changes_fast(pixels: torch.Tensor) -> None:
    sharp, soft = (low(pixels, kernels={"nearest": 1}, **blur) for blur in ({}, {"blur": [3, 3]}))
    assert soft.std() < 0.7 * sharp.std()


def test_noise_has_the_asked_deviation() -> None:
    grey = torch.zeros(3, 400, 400)  # level 127.5, which rounds to 128: far from both ends
    noised = low(grey, noise=[8, 8]) * 127.5
    # 30 000 samples: the deviation's own is 8 / sqrt(2 · 30 000) = 0.033; rounding adds 1/12 to the variance.
    assert abs(float(noised.std()) - (64 + 1 / 12) ** 0.5) < 4 * 0.033


def test_jpeg_is_pillows_of_that_quality(pixels: torch.Tensor) -> None:
    file = io.BytesIO()
    as_image(low(pixels)).save(file, format="JPEG", quality=40)
    assert torch.equal(low(pixels, jpeg=[40, 40]), as_pixels(Image.open(file)))
    assert not torch.equal(low(pixels, jpeg=[40, 40]), low(pixels))


def test_draws_are_those_of_the_generator_alone(pixels: torch.Tensor) -> None:
    every = {"kernels": {"bicubic": 1, "area": 1}, "blur": [0, 2], "noise": [0, 9], "jpeg": [30, 90]}
    assert torch.equal(low(pixels, 7, **every), low(pixels, 7, **every))
    assert not torch.equal(low(pixels, 7, **every), low(pixels, 8, **every))


def test_a_probability_is_that_part_of_the_pictures(pixels: torch.Tensor) -> None:
    plain = low(pixels)
    changed = [not torch.equal(low(pixels, seed, noise=[9, 9], noise_probability=0.3), plain) for seed in range(400)]
    assert abs(sum(changed) / 400 - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5
    assert torch.equal(low(pixels, noise=[9, 9], noise_probability=0), plain)


def test_one_steps_strength_moves_no_other_draw(pixels: torch.Tensor) -> None:
    """What a run learns from a change of the recipe is that change."""
    weak, strong = (low(pixels, 3, kernels={"bicubic": 1, "nearest": 1}, noise=[n, n]) for n in (4, 8))
    plain = low(pixels, 3, kernels={"bicubic": 1, "nearest": 1})
    inside = (strong.abs() < 0.97) & (weak.abs() < 0.97)
    # Twice the deviation is twice the same noise, up to three roundings to 8 bits.
    difference = (strong - plain) - 2 * (weak - plain)
    assert difference[inside].abs().max() <= 1.5 / 127.5 + 1e-6
