"""Whole runs of every method: its file, and a resumed run that is the same run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lora_kit.adapters import read_adapter
from lora_kit.errors import RecipeError
from lora_kit.models import load_bundle
from lora_kit.training import train

RULES = {
    "rslora": "{preset: attention, rank: 2, method: rslora}",
    "dora": "{preset: attention, rank: 2, method: dora, text_encoder: true}",
    "loha": "{preset: attention, rank: 2, method: loha, dropout: 0.1}",
    "lokr": "{preset: attention, rank: 1, method: lokr, factor: 2}",
    "oft": "{preset: attention, method: oft, block_size: 4}",
    "boft": "{preset: attention, method: boft, block_size: 2}",
    "norms": "{match: 'unet.**.norm*', method: diff}",
    "biases": "{match: 'unet.**', method: diff, only: bias}",
    "lokr_conv": "{match: 'unet.**.resnets.*.conv1', method: lokr, rank: 1}",
    "mixed": "[{preset: attention, rank: 2}, {match: 'unet.**.resnets.*.conv1', method: lokr, rank: 1},"
    " {match: 'unet.**.norm*', method: diff}]",
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_resumed_run_is_the_same_run(make_recipe, tmp_path, rules):
    train(make_recipe(f"targets={rules}", "train.gradient_checkpointing=true", name="whole"))
    whole = tmp_path / "whole"
    train(make_recipe(f"targets={rules}", "train.gradient_checkpointing=true", "train.max_steps=2", name="parted"))
    resumed = ("train.resume=latest", "train.gradient_checkpointing=true")
    train(make_recipe(f"targets={rules}", *resumed, name="parted"))
    name = "adapter.safetensors"
    parted = tmp_path / "parted"
    plain = [load_without_header(folder / name) for folder in (whole, parted)]
    assert plain[0] == plain[1]


def load_without_header(path: Path) -> str:
    """The tensors' bytes: the header names the run's folder."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_training_goes_on_from_its_file_and_the_header_says_what_it_is(make_recipe, tmp_path, rules):
    train(make_recipe(f"targets={rules}", "train.max_steps=1", name="first"))
    file = tmp_path / "first" / "adapter.safetensors"
    state = read_adapter(file, load_bundle(make_recipe().model).components)
    changed = [name for name, update in state.updates.items() if _acts(update)]
    assert changed
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    plain = metadata["ss_network_module"] == "networks.lora"
    assert plain == ("rslora" in rules)
    if not plain:
        assert "algo" in json.loads(metadata["ss_network_args"])
    # No step's worth of change: a rate of nearly nothing leaves the file's weights.
    train(
        make_recipe(f"targets={rules}", f"model.adapter={file}", "train.max_steps=1", "optimizer.lr=1e-30", name="next")
    )
    assert load_without_header(tmp_path / "next" / "adapter.safetensors") == load_without_header(file)


def _acts(update) -> bool:
    weight = None
    if update.needs_weight:
        return bool(any(torch.any(part != 0) for part in update.parts().values()))
    deltas = (update.weight_delta(1.0, weight), update.bias_delta(1.0))
    return any(delta is not None and bool(torch.any(delta != 0)) for delta in deltas)


def test_dora_is_written_for_diffusers_and_lokr_is_refused_before_anything_is_loaded(make_recipe, tmp_path):
    rules = "targets={preset: attention, rank: 2, method: dora}"
    train(make_recipe(rules, "save.format=diffusers", "train.max_steps=1", name="diffusers"))
    state = read_adapter(tmp_path / "diffusers" / "adapter.safetensors", load_bundle(make_recipe().model).components)
    assert all("magnitude" in update.parts() for update in state.updates.values())
    train(make_recipe(rules, "save.format=peft", "train.max_steps=1", name="peft"))
    state = read_adapter(tmp_path / "peft" / "adapter", load_bundle(make_recipe().model).components)
    assert all("magnitude" in update.parts() for update in state.updates.values())
    with pytest.raises(RecipeError, match=r"save\.format.*holds LoRA, rsLoRA and DoRA.*lokr.*kohya"):
        make_recipe("targets={preset: attention, rank: 1, method: lokr}", "save.format=diffusers")


def test_norms_alone_can_be_trained_as_they_are(make_recipe, tmp_path):
    """torch 2.13 dies in the backward pass of the first one, whose input needs no gradient, unless it is helped."""
    train(make_recipe("targets={match: 'unet.**.norm*', method: full}", "train.max_steps=1"))
    assert (tmp_path / "run" / "model" / "unet").is_dir()
