"""Training that begins at an adapter file's weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kit.adapters import read_adapter, write_adapter
from lora_kit.cli.main import main
from lora_kit.errors import AdapterFileError, RecipeError
from lora_kit.models import load_bundle
from lora_kit.training import train
from lora_kit.training.build import build_run
from lora_kit.training.checkpoints.resume import begin
from lora_kit.training.processes.launch import build_accelerator


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plan(*arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    return caught.value.code


@pytest.fixture
def other_pictures(make_picture_folder, tmp_path) -> Path:
    return make_picture_folder(tmp_path / "other", count=3, size=(48, 40))


@pytest.fixture
def trained(make_recipe, tmp_path):
    train(make_recipe(name="before"))
    return tmp_path / "before" / "adapter.safetensors"


def other_name(layout: str) -> str:
    return "peft" if layout == "peft" else f"{layout}.safetensors"


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_a_run_begins_at_the_files_very_weights_and_compares_with_the_base_without_them(
    make_recipe, tmp_path, trained, other_pictures, layout
):
    file = tmp_path / other_name(layout)
    networks = load_bundle(make_recipe().model).components
    write_adapter(file, read_adapter(trained, networks), layout)
    held_out = f"validation.held_out={{path: {other_pictures}}}"
    plain = build_run(make_recipe(held_out), build_accelerator(make_recipe(held_out)))
    run = build_run(make_recipe(held_out, f"model.adapter={file}", "train.ema_decay=0.9"), plain.accelerator)
    start = begin(run, None)
    assert start.progress.base_losses == begin(plain, None).progress.base_losses
    stored = load_file(trained.parent / "checkpoints" / "step-000004" / "trainable.safetensors")
    assert stored.keys() == run.trainable.keys()
    assert all(torch.equal(run.trainable[name], tensor) for name, tensor in stored.items())
    assert all(torch.equal(run.average.tensors()[name], tensor) for name, tensor in stored.items())
    assert "begins at the weights of" in start.notices[0]


def test_it_resumes_by_bits_when_the_file_is_gone(make_recipe, tmp_path, trained):
    train(make_recipe(f"model.adapter={trained}"))
    whole = digest(tmp_path / "run" / "adapter.safetensors")
    assert whole != digest(trained)
    trained.unlink()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    train(make_recipe(f"model.adapter={trained}", f"train.resume={checkpoint}"))
    assert digest(tmp_path / "run" / "adapter.safetensors") == whole


def test_everything_in_which_file_and_rules_disagree_is_listed(make_recipe, trained):
    wanted = (
        'targets=[{match: "unet.**.to_{q,v,out.0}", rank: 4}, {match: "unet.**.resnets.*.conv1", rank: 2, alpha: 1}]'
    )
    with pytest.raises(AdapterFileError) as caught:
        train(make_recipe(f"model.adapter={trained}", wanted))
    said = str(caught.value)
    assert "to_k: in the file, not picked by the rules" in said
    assert "the file has rank 2, alpha 2, the rules say rank 2, alpha 1" in said
    wanted = 'targets=[{match: "unet.**.attn*.to_{q,k,v,out.0}", rank: 4}, {match: "unet.**.conv{1,2}", rank: 2}]'
    with pytest.raises(AdapterFileError, match=r"conv2: picked by the rules, not in the file"):
        train(make_recipe(f"model.adapter={trained}", wanted))


def test_plan_says_it_too(make_recipe, tmp_path, trained, capsys):
    make_recipe()
    recipe = str(tmp_path / "recipe.yaml")
    assert plan(recipe, f"model.adapter={trained}") == 0
    assert plan(recipe, f"model.adapter={trained}", "targets.0.rank=8") == 2
    assert "the rules say rank 8" in capsys.readouterr().err


def test_a_file_that_is_missing_or_damaged_or_cannot_be_begun_at_is_told_before_training(
    make_recipe, tmp_path, trained
):
    with pytest.raises(AdapterFileError, match=r"nowhere\.safetensors"):
        train(make_recipe(f"model.adapter={tmp_path}/nowhere.safetensors"))
    tensors = load_file(trained)
    tensors[next(name for name in tensors if name.endswith("lora_down.weight"))].fill_(float("nan"))
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(AdapterFileError, match="NaN"):
        train(make_recipe(f"model.adapter={tmp_path}/nan.safetensors"))
    with pytest.raises(RecipeError, match=r"model\.adapter"):
        make_recipe(f"model.adapter={trained}", 'targets=[{match: "unet.**", method: full}]')


def test_the_header_names_the_file_without_its_folder(make_recipe, tmp_path, trained):
    train(make_recipe(f"model.adapter={trained}"))
    with (tmp_path / "run" / "adapter.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        recipe = json.loads(file.read(size))["__metadata__"]["lora_kit.recipe"]
    assert "adapter: adapter.safetensors" in recipe
    assert str(tmp_path) not in recipe
