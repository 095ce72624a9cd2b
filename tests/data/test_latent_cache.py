"""Latents cached in memory are what encoding each picture anew would give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_kit.data import TrainingSet, cache_latents, open_training_set
from lora_kit.errors import DataError, ModelError
from lora_kit.progress import no_progress
from lora_kit.recipe import DataSection


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """A stand-in for the VAE that treats every pixel alone, so that batching cannot change a bit."""
    left = torch.linspace(0, 1, pixels.shape[-1])
    mean = torch.cat([pixels * left, pixels[:, :1] * 2], 1)[..., ::2, ::2]
    return mean, mean.square() + 0.1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(2)
    for index in range(5):
        Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "text": f"number {index}"} for index in range(5)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def open_set(folder: Path, **fields: object) -> TrainingSet:
    section = {"sources": [{"path": str(folder)}], "resolution": 8, **fields}
    return open_training_set(DataSection.model_validate(section), seed=3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_cached_equals_uncached_bit_for_bit(folder: Path, micro_batch: int, workers: int) -> None:
    cached = open_set(folder, flip=True, caption_dropout=0.5, workers=workers)
    plain = open_set(folder, flip=True, caption_dropout=0.5, cache="none")
    cache_latents(cached, encode, micro_batch, no_progress)
    for position in range(20):
        mine, other = cached[position], plain[position]
        assert (mine.id, mine.position, mine.caption) == (other.id, other.position, other.caption)
        assert mine.pixels is None and other.pixels is not None
        mean, std = encode(other.pixels[None])
        assert mine.latent_mean is not None and torch.equal(mine.latent_mean, mean[0])
        assert mine.latent_std is not None and torch.equal(mine.latent_std, std[0])


def test_training_on_cached_latents_opens_no_picture(folder: Path) -> None:
    training_set = open_set(folder)
    cache_latents(training_set, encode, 2, no_progress)
    for path in folder.glob("*.png"):
        path.unlink()
    assert len([training_set[position] for position in range(10)]) == 10


def test_each_picture_is_encoded_once_and_its_mirror_once(folder: Path) -> None:
    for flip, expected in ((False, [2, 2, 1]), (True, [2, 2, 2, 2, 1, 1])):
        sizes: list[int] = []

        def counting(pixels: Tensor, sizes: list[int] = sizes) -> tuple[Tensor, Tensor]:
            sizes.append(len(pixels))
            return encode(pixels)

        training_set = open_set(folder, flip=flip)
        cache_latents(training_set, counting, 2, no_progress)
        cache_latents(training_set, counting, 2, no_progress)
        assert sizes == expected


def test_plain_sample_comes_from_the_cache_unmirrored(folder: Path) -> None:
    cached, plain = open_set(folder, flip=True), open_set(folder)
    cache_latents(cached, encode, 3, no_progress)
    pixels = plain.plain(4).pixels
    assert pixels is not None
    assert torch.equal(cached.plain(4).latent_mean, encode(pixels[None])[0][0])  # pyright: ignore


def test_half_precision_latents_are_stored_as_float32(folder: Path) -> None:
    training_set = open_set(folder)
    cache_latents(training_set, lambda p: tuple(x.bfloat16() for x in encode(p)), 2, no_progress)  # pyright: ignore
    assert training_set.latents is not None
    for place in range(5):
        latent = training_set.latents.read(place)
        assert latent is not None
        assert latent.mean.dtype == latent.std.dtype == torch.float32
        assert latent.mean.shape == (4, 4, 4)


@pytest.mark.parametrize("fields", [{"cache": "none"}, {"crop": "random"}])
def test_without_cache_the_pictures_are_only_checked(folder: Path, fields: dict[str, object]) -> None:
    training_set = open_set(folder, **fields)

    def unwanted(pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError

    cache_latents(training_set, unwanted, 2, no_progress)
    assert training_set.checked
    assert training_set.latents is None


def test_broken_pictures_are_left_out_of_the_cache(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"")
    training_set = open_set(folder, on_error="skip")
    cache_latents(training_set, encode, 2, no_progress)
    assert [Path(flaw.id).name for flaw in training_set.skipped] == ["1.png"]
    assert training_set.latents is not None
    assert len(training_set.places.record) == 4
    other = open_set(folder, on_error="skip", cache="none")
    cache_latents(other, encode, 2, no_progress)
    for position in range(8):
        pixels = other[position].pixels
        assert pixels is not None
        assert torch.equal(training_set[position].latent_mean, encode(pixels[None])[0][0])  # pyright: ignore


def test_broken_picture_stops_the_cache_with_raise(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)1 record .*1\.png: not a readable picture"):
        cache_latents(open_set(folder, on_error="raise"), encode, 2, no_progress)


def test_latents_that_are_not_finite_are_an_error(folder: Path) -> None:
    def overflowing(pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = encode(pixels)
        mean[-1, 0, 0, 0] = float("inf")
        return mean, std

    with pytest.raises(ModelError, match=r"not finite for .*/1\.png\. Hold the VAE in fp32"):
        cache_latents(open_set(folder), overflowing, 2, no_progress)
