"""Pictures: equal to diffusers' pipeline, independent of batching, exact at strength 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_samples import adapter_file, bundle_of
from PIL import Image

from lora_kit.errors import RecipeError
from lora_kit.inference import SamplingSettings, compose_grid, draw, generate, prepare
from lora_kit.models import pipeline

SMALL = SamplingSettings(steps=4, guidance=3.0, negative_prompt="grey house", width=16, height=16)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.int16)


def test_pictures_equal_diffusers_own_pipeline(tiny_sd1_folder):
    bundle = bundle_of(tiny_sd1_folder)
    (ours,) = draw(bundle, ["red apple"], [3], settings=SMALL)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(bundle)(
        "red apple", negative_prompt="grey house", num_inference_steps=4, guidance_scale=3.0, latents=latents
    ).images[0]
    # The same operations in fp32; a value on the edge between two bytes may fall either way.
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


def test_batching_changes_a_picture_by_rounding_only(tiny_sd1_folder):
    bundle = bundle_of(tiny_sd1_folder)
    prompts, seeds = ["red apple", "blue boat", "black cat"], [0, 1, 2]
    alone = [draw(bundle, [p], [s], settings=SMALL)[0] for p, s in zip(prompts, seeds, strict=True)]
    together = draw(bundle, prompts, seeds, settings=SMALL)
    assert max(np.abs(pixels(a) - pixels(b)).max() for a, b in zip(alone, together, strict=True)) <= 1


def test_strength_zero_is_the_base_bit_for_bit_and_one_is_not(tiny_sd1_folder: Path, tmp_path: Path):
    base = draw(bundle_of(tiny_sd1_folder), ["red apple"], [0], settings=SMALL)[0]
    file = adapter_file(tmp_path / "a.safetensors", bundle_of(tiny_sd1_folder).components)
    prepared = prepare(str(tiny_sd1_folder), [file])
    drawn = {s: generate(prepared, ["red apple"], [0], [s], SMALL)[0].image for s in (1.0, 0.0)}
    assert drawn[0.0].tobytes() == base.tobytes()
    assert drawn[1.0].tobytes() != base.tobytes()


def test_drawing_leaves_modes_and_the_global_generator_alone(tiny_sd1_folder):
    bundle = bundle_of(tiny_sd1_folder)
    bundle.unet.train()
    before = torch.get_rng_state()
    draw(bundle, ["red apple"], [0], settings=SMALL)
    assert bundle.unet.training
    assert torch.equal(before, torch.get_rng_state())


def test_a_size_the_base_cannot_draw_is_refused_with_the_nearest(tiny_sd1_folder):
    with pytest.raises(RecipeError, match=r"width: got 15.*multiples of 2.*try 16"):
        draw(bundle_of(tiny_sd1_folder), ["x"], [0], settings=SamplingSettings(width=15, height=16))


def test_a_grid_holds_every_picture_unchanged_but_enlarged():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    cells = [Image.new("RGB", (64, 64), colour) for colour in colours]
    sheet = compose_grid([cells[:2], cells[2:]], ["one", "two"], ["a", "b"])
    found = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
    assert all(found[colour] == 128 * 128 for colour in colours)
