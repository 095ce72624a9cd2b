"""recipes/quickstart.yaml shows subjects that it does not train on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from lora_kit.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def captions(folder: Path) -> set[str]:
    return {json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()}


def pictures(folder: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(RECIPES / "quickstart.yaml")


def test_it_trains_on_48_drawings_and_is_measured_on_128_others(recipe):
    trained, held_out = Path(recipe.data.sources[0].path), Path(recipe.validation.held_out.path)
    assert (len(pictures(trained)), len(pictures(held_out))) == (48, 128)
    assert not captions(trained) & captions(held_out)
    assert not pictures(trained) & pictures(held_out)


def test_it_draws_subjects_that_are_not_among_the_48(recipe):
    assert recipe.validation.prompts
    assert not set(recipe.validation.prompts) & captions(Path(recipe.data.sources[0].path))
