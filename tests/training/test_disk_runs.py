"""Runs that read latents and captions' states from the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_kit.data.cache import CacheStore
from lora_kit.models.family.families import StableDiffusion
from lora_kit.recipe import Recipe
from lora_kit.training import train

MakeRecipe = Callable[..., Recipe]
DISK = ("data.cache=disk", "data.flip=true")


@pytest.fixture
def make_disk(make_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    def make(*overrides: str, **places: Any) -> Recipe:
        return make_recipe(*DISK, f"data.cache_dir={tmp_path / 'cache'}", *overrides, **places)

    return make


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()


def curve(folder: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


def weights_digest(folder: Path) -> str:
    """Of the last checkpoint: the header of an adapter tells of the recipe, which differs here."""
    return hashlib.sha256((folder / "checkpoints" / "step-000004" / "trainable.safetensors").read_bytes()).hexdigest()


def test_a_run_from_the_disk_is_the_run_from_memory(make_recipe: MakeRecipe, make_disk: MakeRecipe, tmp_path: Path):
    # The VAE may see the same pictures in other batches, which changes a latent's last bits and nothing else.
    train(make_recipe("data.flip=true", "optimizer.lr=1e-4", name="memory"))
    train(make_disk("optimizer.lr=1e-4", name="disk"))
    torch.testing.assert_close(curve(tmp_path / "disk"), curve(tmp_path / "memory"), rtol=1e-5, atol=0)


def test_with_everything_cached_no_encoder_works_or_moves(
    make_disk: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = make_disk(name="first")
    train(first)

    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError

    for name in ("encode", "condition", "caption_states"):
        monkeypatch.setattr(StableDiffusion, name, unwanted)
    moved: list[str] = []
    own_to = nn.Module.to

    def watching(network: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        if arguments and isinstance(arguments[0], torch.device):
            moved.append(type(network).__name__)
        return own_to(network, *arguments, **options)

    monkeypatch.setattr(nn.Module, "to", watching)
    train(make_disk(name="second"))
    assert not {"AutoencoderKL", "CLIPTextModel"} & set(moved)
    assert weights_digest(tmp_path / "second") == weights_digest(tmp_path / "first")


def test_a_resumed_run_from_the_disk_with_workers_is_bit_identical(make_disk: MakeRecipe, tmp_path: Path):
    train(make_disk("data.workers=2"))
    whole = digest(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    train(make_disk("data.workers=2", f"train.resume={checkpoint}"))
    assert digest(tmp_path / "run") == whole


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_entry_is_made_again_from_its_picture(make_disk: MakeRecipe, tmp_path: Path):
    train(make_disk("optimizer.lr=1e-4", name="whole"))
    store = CacheStore(tmp_path / "cache")
    total = len(store)
    # Of the latents, one that every epoch of eight pictures reads: entries of pictures have a mean.
    rows = [row for row in store.rows() if "mean" in (store.read(row) or {})]
    for row in rows[:4]:
        path, entry = store.entry(row)
        flip_byte(path, entry.begin)
    train(make_disk("optimizer.lr=1e-4", name="damaged"))
    # As from memory: other batches, other last bits.
    torch.testing.assert_close(curve(tmp_path / "damaged"), curve(tmp_path / "whole"), rtol=1e-5, atol=0)
    noted = list((tmp_path / "cache" / "damaged").glob("*.txt"))
    assert noted
    assert len(CacheStore(tmp_path / "cache")) == total - len(noted)
    train(make_disk("optimizer.lr=1e-4", name="rebuilt"))
    assert len(CacheStore(tmp_path / "cache")) == total


def test_a_held_out_set_is_read_from_the_disk_too(make_disk: MakeRecipe, tmp_path: Path):
    recipe = make_disk("train.max_steps=1")
    held_out = recipe.validation.model_copy(update={"held_out": recipe.data.sources[0]})
    train(recipe.model_copy(update={"validation": held_out}))
    on_disk = json.loads((tmp_path / "run" / "result.json").read_text())
    recipe = make_disk("train.max_steps=1", "data.cache=memory", name="memory")
    train(recipe.model_copy(update={"validation": held_out}))
    in_memory = json.loads((tmp_path / "memory" / "result.json").read_text())
    assert on_disk["held_out_base_loss"] == pytest.approx(in_memory["held_out_base_loss"], rel=1e-5)


def test_a_resumed_run_says_that_its_data_changed(
    make_disk: MakeRecipe, make_picture_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pictures = make_picture_folder(tmp_path / "pictures")
    train(make_disk("train.max_steps=2", pictures=pictures))
    train(make_disk("train.resume=latest", pictures=pictures))
    assert "is no longer the run that was begun" not in capsys.readouterr().err
    (pictures / "003.png").unlink()
    train(make_disk("train.max_steps=6", "train.resume=latest", pictures=pictures))
    said = capsys.readouterr().err
    assert "is no longer the run that was begun" in said
    assert "1 pictures cannot be used and are skipped: pictures/003.png" in said
    assert "003.png: the file is missing" in (tmp_path / "run" / "skipped.txt").read_text()
