"""Samples for a model that needs the pictures in each step: pixels beside kept latents, and masks that are filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_kit.data import cache_latents, collate, open_training_set
from lora_kit.progress import no_progress
from lora_kit.recipe import DataSection


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """As a VAE of factor 8 would, without one."""
    mean = torch.nn.functional.avg_pool2d(pixels, 8)
    return mean, torch.zeros_like(mean)


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Pictures that are white where their masks are."""
    folder = tmp_path / "set"
    folder.mkdir()
    for index in range(4):
        values = np.zeros((24, 40), np.uint8)
        values[4 + index : 16, 16 : 40 - index] = 255
        Image.fromarray(values).convert("RGB").save(folder / f"{index}.png")
        Image.fromarray(values).save(folder / f"{index}-mask.png")
        (folder / f"{index}.txt").write_text("a")
    return folder


def data_section(folder: Path, **fields: object) -> DataSection:
    source = {"path": str(folder), "mask_suffix": "-mask"}
    whole = {"sources": [source], "resolution": 24, "flip": True, "batch_size": 2} | fields
    return DataSection.model_validate(whole)


def test_pixels_come_beside_kept_latents_in_the_same_view(masked: Path) -> None:
    data = open_training_set(data_section(masked), 0, bar=no_progress)
    data.keeps_pixels = True
    cache_latents(data, encode, 2, no_progress)
    seen = set[bytes]()
    for start in range(0, 16, 2):
        batch = collate([data[start], data[start + 1]])
        assert batch.is_latent.all() and batch.pixels is not None and batch.latent_mean is not None
        assert batch.unencoded is None
        assert torch.equal(encode(batch.pixels)[0], batch.latent_mean), "mirrored as the latent is"
        assert batch.masks is not None and not batch.holes
        seen |= {one.numpy().tobytes() for one in batch.pixels}
    assert len(seen) > 4, "some of the four pictures in both directions"


def test_of_a_mixed_batch_only_what_is_not_kept_is_to_be_encoded(masked: Path) -> None:
    data = open_training_set(data_section(masked), 0, bar=no_progress)
    data.keeps_pixels = True
    samples = [data.plain(record) for record in range(3)]
    mean, std = encode(samples[1].pixels[None])  # type: ignore[index]
    samples[1] = samples[1]._replace(latent_mean=mean[0], latent_std=std[0])
    batch = collate(samples)
    assert batch.is_latent.tolist() == [False, True, False]
    assert batch.pixels is not None and len(batch.pixels) == 3
    assert batch.unencoded is not None and torch.equal(batch.unencoded, batch.pixels[[0, 2]])


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("kept", [True, False])
def test_masks_that_are_filled_are_cut_and_mirrored_pixel_by_pixel(masked: Path, crop: str, kept: bool) -> None:
    data = open_training_set(data_section(masked, crop=crop), 0, bar=no_progress)
    data.keeps_pixels = data.fills_masks = True
    if kept:
        cache_latents(data, encode, 2, no_progress)
    for position in range(8):
        sample = data[position]
        assert sample.mask is None, "all of the picture counts in the loss"
        assert sample.pixels is not None and sample.hole is not None
        torch.testing.assert_close(sample.hole, (sample.pixels[:1] + 1) / 2, rtol=0, atol=1e-6)


def test_pictures_that_are_read_in_each_step_are_read_by_workers(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kit.data import loader

    asked: list[int] = []
    options: Callable[[int], dict[str, object]] = lambda workers: asked.append(workers) or {}  # noqa: E731
    monkeypatch.setattr(loader, "worker_options", options)
    data = open_training_set(data_section(masked, workers=2), 0, bar=no_progress)
    cache_latents(data, encode, 2, no_progress)
    for keeps in (False, True):
        data.keeps_pixels = keeps
        loader.make_batch_loader(data, [[0, 1]])  # type: ignore[arg-type]
    assert asked == [0, 2]
