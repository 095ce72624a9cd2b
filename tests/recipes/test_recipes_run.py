"""Every recipe in recipes/ loads, names itself in its launch line, and trains two steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline

from lora_kit.adapters import AdapterState, load_adapter
from lora_kit.adapters.token_files import read_embedding
from lora_kit.models import load_bundle
from lora_kit.recipe import load_recipe
from lora_kit.training import train
from lora_kit.training.result import SAVE_DTYPES

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
PLAIN = "tiny_sd1_folder"
SMALL = {
    "2-1": "tiny_sd2_folder",
    "inpainting": "tiny_inpainting_folder",
    "ldm-text2im": "tiny_text2im_folder",
    "super-resolution": "tiny_super_resolution_folder",
}
"""What a recipe's base is called → the small one of its kind."""


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def beside_its_pictures(tmp_path, picture_folder):
    """A function: recipe → a copy of it, beside a folder for each that it names."""

    def copy(recipe: Path) -> Path:
        place = tmp_path / "recipes"
        place.mkdir()
        document = yaml.safe_load(recipe.read_text())
        named = [*document["data"]["sources"], document.get("validation", {}).get("held_out")]
        for source in (one for one in named if one and "path" in one):
            folder = place / source["path"]
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(ROOT / "recipes" / source["path"] if "/" in source["path"] else picture_folder)
        (place / recipe.name).write_text(recipe.read_text())
        return place / recipe.name

    return copy


def test_there_are_the_recipes_that_the_readme_lists():
    listed = set(re.findall(r"recipes/(\w+)\.yaml", (ROOT / "README.md").read_text()))
    assert set(NAMES) == listed


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_it_opens_with_a_launch_line_of_itself(recipe):
    first = recipe.read_text().splitlines()[0]
    words = shlex.split(first.removeprefix("# "))
    assert words[:2] == ["accelerate", "launch"]
    assert words[-2:] == ["scripts/train_lora.py", f"recipes/{recipe.name}"]
    assert (ROOT / words[-2]).is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_it_trains_two_steps_and_the_result_can_be_loaded(recipe, beside_its_pictures, tmp_path, monkeypatch, request):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    copy = beside_its_pictures(recipe)
    as_written = load_recipe(copy)
    base = request.getfixturevalue(next((name for mark, name in SMALL.items() if mark in as_written.model.base), PLAIN))
    small = [f"model.base={base}", "data.resolution=16", "data.batch_size=2", "data.workers=0", "train.max_steps=2"]
    small += ["train.mixed_precision=no", "train.log_every=1", "validation.steps=1", "validation.retrieval=false"]
    small += [f"data.cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'run'}", "schedule.warmup_steps=0"]
    small += ["train.micro_batch_size=1"] if as_written.train.micro_batch_size else []
    small += ["schedule.decay_steps=0"] if as_written.schedule.decay_steps else []
    small += ["data.buckets.step=8"] if as_written.data.buckets else []
    small += ["tokens.0.initializer=cat"] if as_written.tokens else []  # a word of the small vocabulary
    outcome = train(load_recipe(copy, small))
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
    for path in outcome.paths:
        base = load_bundle(load_recipe(copy, small).model)
        if path.is_dir():
            trained = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
            dtype = SAVE_DTYPES[as_written.save.dtype]
            changed = {name: moved(getattr(base, name), getattr(trained, name), dtype) for name in ("unet", "vae")}
            assert changed["unet"] > 0.5  # what two steps at a small rate leave in the file's fp16
            assert changed["vae"] == 0
        elif path.parent.name == "embeddings":
            token, vectors = read_embedding(path)
            load_adapter(base, AdapterState({}, {}, {token: vectors}))
            assert not torch.equal(vectors[0], vectors[1])  # both began as the same word
        else:
            updates = load_adapter(base, path).updates
            still = [name for name, update in updates.items() if not update.weight_delta(1.0).any()]
            assert not still


def moved(before, after, dtype) -> float:
    """The share of a network's parameters that are not the same any more, in the precision that was saved."""
    others = dict(after.named_parameters())
    pairs = [(weight, others[name]) for name, weight in before.named_parameters()]
    return sum(not torch.equal(one.to(dtype), other.to(dtype)) for one, other in pairs) / len(pairs)
