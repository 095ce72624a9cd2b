from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.optim import AdamW8bit
from PIL import Image

from lora_kit.cli.main import main
from lora_kit.cli.plan_facts import memory, steps
from lora_kit.cli.plan_sources import data_facts
from lora_kit.recipe import Recipe, load_recipe
from lora_kit.targeting import ModuleInfo, Target, TargetPlan, plan_from_json
from lora_kit.training.build import build_run


@pytest.fixture
def recipe(tiny_sd1_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for index in range(5):
        Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text("a cat")
    sections: dict[str, Any] = {
        "model": {"base": str(tiny_sd1_folder)},
        "targets": {"preset": "kohya", "rank": 2},
        "data": {"sources": [{"path": "pictures", "repeats": 2}], "resolution": 16, "batch_size": 4},
        "train": {"max_steps": 30},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(sections))  # JSON is YAML
    return path


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_json_is_one_document_and_nothing_else(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(str(recipe), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    plan = plan_from_json(document["plan"])
    assert document["trainable_parameters"] == plan.trainable_parameters
    assert {target.module.component for target in plan.targets} == {"unet"}
    assert document["steps"] == {
        "max_steps": 30,
        "batch_size": 4,
        "micro_batch_size": None,
        "samples_per_epoch": 10,
        "epochs": 12.0,
    }


def test_table_and_facts_for_humans(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(str(recipe), "train.micro_batch_size=2") == 0
    shown = capsys.readouterr().out
    assert "preset kohya" in shown
    assert "lora rank 2" in shown
    assert "steps: 30 of 4 pictures in micro-batches of 2; 12 epochs of 10 samples" in shown
    assert "frozen weights" in shown and "activations come on top: --memory reckons them" in shown


def test_the_peak_is_the_sum_of_its_parts(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(str(recipe), "train.micro_batch_size=2", "--memory", "--json") == 0
    held = json.loads(capsys.readouterr().out)["memory_bytes"]
    parts = (held[part] for part in ("frozen", "trainable", "activations", "libraries", "kept"))
    assert held["rested"] > 0  # the VAE, once latents are kept
    assert held["expected_peak"] == held["expected_peaks"]["steps"] == sum(parts) - held["rested"]


@pytest.mark.slow
def test_the_peak_is_told_to_people(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(str(recipe), "--memory") == 0
    shown = capsys.readouterr().out
    assert "activations of 4 pictures of " in shown and "expected at a step's peak" in shown


def test_overrides_change_the_plan(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(str(recipe), "targets.rank=3", "--json") == 0
    ranks = {target["rank"] for target in json.loads(capsys.readouterr().out)["plan"]["targets"]}
    assert ranks == {3}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_memory_of_a_quantised_base_is_what_a_run_holds(
    recipe: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(str(recipe), "--json") == 0
    plain = json.loads(capsys.readouterr().out)["memory_bytes"]
    assert plain["unquantised"] is None
    assert _run(str(recipe), "--json", f"model.quantize={kind}") == 0
    held = json.loads(capsys.readouterr().out)["memory_bytes"]
    run = build_run(load_recipe(recipe, [f"model.quantize={kind}"]), Accelerator(cpu=True))
    assert run.quantised is not None
    assert held["unquantised"] == plain["frozen"]
    assert plain["frozen"] - held["frozen"] == run.quantised.before - run.quantised.after > 0


def test_rule_that_picks_nothing_exits_2_without_output(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(str(recipe), 'targets=[{match: "unet.**.to_z"}]', "--json") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: targets.0.match: `unet.**.to_z` picks nothing.")
    assert "to_q" in shown.err


def _recipe(**sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"data": {"sources": [{"path": "owner/set"}], "batch_size": 8}, **sections})


MODULES = [
    ModuleInfo("unet.a", "linear", (1000, 500), 501_000),
    ModuleInfo("unet.b", "conv", (64, 32, 3, 3), 18_496),
    ModuleInfo("text_encoder.c", "linear", (10, 10), 110),
]
SIZES = {"unet": 519_496, "text_encoder": 110, "vae": 1000}


def _plan(method: str) -> TargetPlan:
    given = [Target(module, 0, method, 16, 16.0, 0.0, 1.0) for module in MODULES[:2]]
    return TargetPlan(tuple(given), (), {})


def test_memory_of_lora_over_a_bf16_base() -> None:
    held = memory(_recipe(train={"mixed_precision": "bf16"}), _plan("lora"), SIZES)
    trained = 16 * (1000 + 500) + 16 * (32 * 9 + 64)
    assert (held.weights, held.gradients, held.moments, held.average) == (4 * trained, 4 * trained, 8 * trained, 0)
    assert held.frozen == 2 * (519_496 + 110) + 4 * 1000


def test_memory_of_full_training_with_an_average() -> None:
    held = memory(_recipe(train={"mixed_precision": "bf16", "ema_decay": 0.99}), _plan("full"), SIZES)
    assert held.trainable == (4 + 4 + 8 + 4) * (501_000 + 18_496)
    assert held.frozen == 4 * 110 + 4 * 1000


def test_8_bit_moments_as_bitsandbytes_holds_them() -> None:
    shapes = [(16, 500), (1000, 16), (16, 32, 3, 3), (64, 16, 1, 1)]  # of _plan's four factors
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = AdamW8bit(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = [optimizer.state[weight] for weight in weights]
    kept = [state[key] for state in states for key in ("state1", "state2", "absmax1", "absmax2") if key in state]
    expected = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    assert memory(_recipe(optimizer={"name": "adamw8bit"}), _plan("lora"), SIZES).moments == expected


def test_data_of_the_hub_is_not_counted() -> None:
    recipe = _recipe(train={"max_steps": 7})
    length = steps(recipe, data_facts(recipe.data).samples)
    assert (length.samples_per_epoch, length.epochs) == (None, None)


def test_an_objective_that_the_base_cannot_have_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(str(recipe), "objective.zero_terminal_snr=true") == 2
    assert "objective.zero_terminal_snr: `true` with a network that predicts the noise" in capsys.readouterr().err
    assert _run(str(recipe), "objective.zero_terminal_snr=true", "model.prediction_type=sample") == 0
