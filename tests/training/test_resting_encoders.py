"""Encoders whose products are all kept are given back for the steps, and that changes nothing of what a run makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_kit.models.released import is_released
from lora_kit.recipe import Recipe
from lora_kit.training import run as runs
from lora_kit.training.run import train

MakeRecipe = Callable[..., Recipe]
DRAWS = ('validation.prompts=["a cat"]', "validation.every=2")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Whether VAE and text encoder were gone, after each step."""
    found: list[tuple[bool, bool]] = []
    step = runs.take_step

    def watched(steps: Any, *arguments: Any, **options: Any) -> Any:
        done = step(steps, *arguments, **options)
        bundle = steps.run.bundle
        found.append((is_released(bundle.vae), is_released(bundle.text_encoder)))
        return done

    monkeypatch.setattr(runs, "take_step", watched)
    return found


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (("data.cache=disk",), (True, True)),
        (("data.cache=memory",), (True, False)),
        (("data.cache=none",), (False, False)),
        (("data.cache=disk", "data.crop=random"), (False, True)),
        (("data.cache=disk", "targets={preset: attention, text_encoder: true}"), (True, False)),
        (("data.cache=disk", "model.quantize=int8"), (True, True)),
    ],
    ids=str,
)
def test_what_steps_do_not_need_is_gone(
    options: tuple[str, ...],
    gone: tuple[bool, bool],
    make_recipe: MakeRecipe,
    seen: list[tuple[bool, bool]],
    tmp_path: Path,
) -> None:
    train(make_recipe(*options, *DRAWS, f"data.cache_dir={tmp_path / 'cache'}"))
    assert seen == [gone] * 4  # after drawing, too


def test_captions_beyond_those_that_are_kept_need_the_text_encoder(
    make_recipe: MakeRecipe,
    seen: list[tuple[bool, bool]],
    make_picture_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = make_picture_folder(tmp_path / "tagged", count=2)
    tags = ", ".join(f"tag{index}" for index in range(8))
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    text = "\n".join(line.split('"text"')[0] + f'"text": "{tags}"}}' for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n")
    options = ("data.cache=disk", "data.captions={shuffle: true}", f"data.cache_dir={tmp_path / 'cache'}")
    train(make_recipe(*options, pictures=folder))
    assert seen == [(True, False)] * 4


def test_weights_and_pictures_are_those_of_a_run_that_keeps_them(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ("data.cache=disk", f"data.cache_dir={tmp_path / 'cache'}", *DRAWS, "validation.held_out=0.25")
    train(make_recipe(*options, name="gone"))
    monkeypatch.setattr(runs, "rest_encoders", lambda *given: [])
    train(make_recipe(*options, name="kept"))
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("gone", "kept"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    drawn = sorted(path.relative_to(tmp_path / "gone") for path in (tmp_path / "gone" / "samples").rglob("*.png"))
    assert drawn
    for path in drawn:
        assert (tmp_path / "gone" / path).read_bytes() == (tmp_path / "kept" / path).read_bytes()


def test_a_full_fine_tune_writes_the_encoders_it_gave_back(
    make_recipe: MakeRecipe, tiny_sd1_folder: Path, tmp_path: Path
) -> None:
    options = ("data.cache=disk", f"data.cache_dir={tmp_path / 'cache'}", "save.dtype=fp32")
    train(make_recipe("targets={preset: attention, method: full}", *options))
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        written = load_file(next((tmp_path / "run").rglob(f"{part}/{name}.safetensors")))
        base = load_file(tiny_sd1_folder / part / f"{name}.safetensors")
        assert all(torch.equal(written[key], value) for key, value in base.items())
