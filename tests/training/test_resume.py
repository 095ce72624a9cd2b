"""Resuming: what is said about changes, how the learning rate goes on, damaged checkpoints, the best one."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from lora_kit.errors import RecipeError, TrainingError
from lora_kit.recipe import Recipe
from lora_kit.training import train
from lora_kit.training.checkpoints.resume import changed_keys, changed_rates
from lora_kit.training.checkpoints.state import Progress
from lora_kit.training.validation.measuring import Measured


@pytest.fixture(scope="session")
def other_pictures(tmp_path_factory: pytest.TempPathFactory, make_picture_folder) -> Path:
    """Three pictures to hold out."""
    return make_picture_folder(tmp_path_factory.mktemp("pictures") / "three", count=3, size=(48, 40))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(folder: Path, key: str = "loss") -> list[dict]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if key in line]


def rates(folder: Path) -> list[float]:
    return [line["lr"] for line in lines(folder)]


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer={name: prodigy}", "schedule.warmup_steps=2"],
        ["optimizer={name: adamw_schedulefree, lr: 0.01}"],
        ["optimizer={name: adafactor, lr: 0.01, lr_ratio: 4.0}", "train.ema_decay=0.9", "train.ema_warmup=0.75"],
        ["optimizer={name: sgd, lr: 0.1, args: {momentum: 0.9}}", "schedule.name=linear"],
    ],
    ids=["prodigy", "schedulefree", "adafactor+ema", "sgd"],
)
def test_a_resumed_run_is_bit_identical_with_every_kind_of_state(make_recipe, tmp_path, overrides):
    run = tmp_path / "run"
    train(make_recipe(*overrides))
    whole = {path.name: digest(path) for path in run.glob("*.safetensors")}
    curve = lines(run)
    for name in whole:
        (run / name).unlink()
    train(make_recipe(*overrides, f"train.resume={run / 'checkpoints' / 'step-000002'}"))
    assert {path.name: digest(path) for path in run.glob("*.safetensors")} == whole
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in curve]


def test_schedule_free_results_do_not_depend_on_looking_at_them(make_recipe, tmp_path, other_pictures):
    settings = ["optimizer={name: adamw_schedulefree, lr: 0.01}", "save.every=0"]
    held_out = f"validation.held_out={{path: {other_pictures}}}"
    train(make_recipe(*settings, name="plain"))
    train(make_recipe(*settings, held_out, "validation.every=1", name="looked"))
    paths = [tmp_path / name / "checkpoints" / "step-000004" / "trainable.safetensors" for name in ("plain", "looked")]
    assert digest(paths[0]) == digest(paths[1])


def test_the_average_has_a_file_of_its_own_and_both_say_what_they_are(make_recipe, tmp_path, capsys):
    from safetensors import safe_open

    outcome = train(make_recipe("train.ema_decay=0.9"))
    train(make_recipe(name="plain"))
    run = tmp_path / "run"
    assert outcome.paths == [run / "adapter.safetensors", run / "adapter.ema.safetensors"]
    read = [safe_open(str(path), "pt") for path in outcome.paths]
    said = [file.metadata()["lora_kit.weights"] for file in read]
    assert said == ["as trained", "exponential moving average, decay 0.9"]
    assert outcome.lines()[1].endswith("moving average, decay 0.9; validation measured and drew these")
    assert json.loads((run / "result.json").read_text())["weights"] == said[1]
    # Keeping an average changes nothing of what is trained.
    plain = safe_open(str(tmp_path / "plain" / "adapter.safetensors"), "pt")
    keys = list(plain.keys())
    assert all(torch.equal(plain.get_tensor(key), read[0].get_tensor(key)) for key in keys)
    assert not all(torch.equal(plain.get_tensor(key), read[1].get_tensor(key)) for key in keys)


def test_a_longer_run_says_how_the_rate_changes_and_follows_the_new_curve(make_recipe, tmp_path, capsys):
    cosine = "schedule.name=cosine"
    train(make_recipe(cosine))
    capsys.readouterr()
    train(make_recipe(cosine, "train.max_steps=8", "train.resume=latest"))
    said = capsys.readouterr().err
    # Step 5 of 8 is half way down: 0.01 × (1 + cos(π/2)) / 2.
    assert "train.max_steps: 4 → 8." in said
    assert "step 5 had none, its last step is done by the checkpoint's recipe and has 0.005 now" in said
    assert rates(tmp_path / "run")[4] == pytest.approx(0.005)
    assert len(rates(tmp_path / "run")) == 8


def test_an_unchanged_recipe_says_nothing_of_changes(make_recipe, tmp_path, capsys):
    train(make_recipe())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    capsys.readouterr()
    train(make_recipe("train.resume=latest", "save.every=1", "train.log_every=2"))
    said = capsys.readouterr().err
    assert "resumed from" in said
    assert "not the checkpoint's" not in said
    assert "rate" not in said


def test_a_rewarm_is_begun_once_and_goes_on_after_another_resume(make_recipe, tmp_path):
    run, asked = tmp_path / "run", ("schedule.rewarm_steps=3", "train.max_steps=8", "save.every=1", "save.keep=9")
    train(make_recipe("save.every=1"))
    train(make_recipe(*asked, "train.resume=latest"))
    ramp = [0.01 * share for share in (1, 1, 1, 1, 0.25, 0.5, 0.75, 1)]
    assert rates(run) == pytest.approx(ramp)
    whole = digest(run / "adapter.safetensors")
    train(make_recipe(*asked, f"train.resume={run / 'checkpoints' / 'step-000006'}"))
    assert rates(run) == pytest.approx(ramp)
    assert digest(run / "adapter.safetensors") == whole


def test_a_run_is_not_resumed_past_its_end(make_recipe):
    train(make_recipe())
    with pytest.raises(RecipeError, match=r"train\.max_steps: got 3, but .*step-000004 is at step 4 already"):
        train(make_recipe("train.max_steps=3", "train.resume=latest"))


def test_another_optimizer_cannot_go_on_from_the_checkpoint(make_recipe):
    train(make_recipe("train.max_steps=2"))
    with pytest.raises(TrainingError, match=r"Put `optimizer\.name` back"):
        train(make_recipe("optimizer.name=adam", "train.resume=latest"))


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(make_recipe, tmp_path, capsys):
    train(make_recipe())
    run = tmp_path / "run"
    whole, newest = digest(run / "adapter.safetensors"), run / "checkpoints" / "step-000004"
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[-5] ^= 16
    (newest / "optimizer.safetensors").write_bytes(data)
    with pytest.raises(TrainingError, match=r"optimizer\.safetensors is not what was written"):
        train(make_recipe(f"train.resume={newest}"))
    capsys.readouterr()
    train(make_recipe("train.resume=latest"))
    said = capsys.readouterr().err
    assert "step-000004 is damaged (optimizer.safetensors is not what was written" in said
    assert "step-000002, after step 2" in said.replace("\n", "")
    assert digest(run / "adapter.safetensors") == whole


def test_a_run_without_any_whole_checkpoint_does_not_begin_anew_by_itself(make_recipe, tmp_path):
    train(make_recipe("save.every=0"))
    (tmp_path / "run" / "checkpoints" / "step-000004" / "state.json").unlink()
    with pytest.raises(TrainingError, match=r"(?s)is whole.*state\.json is missing.*train\.overwrite=true"):
        train(make_recipe("train.resume=latest"))


def test_the_checkpoint_of_the_lowest_held_out_loss_is_kept_as_best(make_recipe, tmp_path, other_pictures, monkeypatch):
    # Losses that fall until step 3 and then rise; the last step's own is measured, and is far above 0.
    monkeypatch.setattr(
        "lora_kit.training.run.validate",
        lambda run, folder, metrics, step, base: Measured({"held_out_loss": abs(step - 3)}, [[abs(step - 3)]]),
    )
    held_out = f"validation.held_out={{path: {other_pictures}}}"
    settings = [held_out, "validation.every=1", "train.max_steps=5", "save.every=0", "save.keep=1"]
    train(make_recipe(*settings))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best", "step-000003", "step-000005"]
    assert (folder / "best").resolve().name == "step-000003"
    # And it can be gone on from by that name.
    whole = digest(tmp_path / "run" / "adapter.safetensors")
    train(make_recipe(*settings, f"train.resume={folder / 'best'}"))
    assert digest(tmp_path / "run" / "adapter.safetensors") == whole


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The losses of these steps (0-based) are not finite."""
    from lora_kit.training import step as module

    sound = module._backward
    monkeypatch.setattr(
        module, "_backward", lambda learner, batch, at: sound(learner, batch, at) * (torch.nan if at in steps else 1.0)
    )


def test_a_step_that_is_not_finite_is_skipped_and_told_where_asked(make_recipe, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, 1)
    train(make_recipe("train.non_finite=skip"))
    skipped = lines(tmp_path / "run", "skipped")
    assert [line["step"] for line in skipped] == [2]
    assert "The loss of step 2 is nan" in skipped[0]["skipped"]
    assert "Skipped, 1 in a row" in capsys.readouterr().err
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 3, 4]


def test_too_many_in_a_row_stop_the_run_also_over_a_resume(make_recipe, tmp_path, monkeypatch):
    limits = ("train.non_finite=skip", "train.max_non_finite=2", "save.every=1")
    spoil(monkeypatch, 1, 2, 3)
    with pytest.raises(TrainingError, match=r"step 4 is nan.*in a row: 3, .*max_non_finite is 2.*step-000003"):
        train(make_recipe(*limits))
    with pytest.raises(TrainingError, match="in a row: 3"):
        train(make_recipe(*limits, "train.resume=latest"))


def document(**sections) -> tuple[Recipe, dict]:
    recipe = Recipe.model_validate({"data": {"sources": [{"path": "x"}]}, **sections})
    return recipe, recipe.model_dump(mode="json")


def said_of_rates(before: dict, after: dict, step: int) -> list[str]:
    recipe, now = document(**after)
    start = [Progress(step, {}, [], recipe=tree) for tree in (document(**before)[1], now)]
    return changed_rates(*start, recipe)


def test_what_is_said_of_the_learning_rate_is_what_changes():
    short, long = {"train": {"max_steps": 10}}, {"train": {"max_steps": 20}}
    assert said_of_rates(short, short, 5) == []
    stays = "train.max_steps: 10 → 20. The learning rate of the steps that were planned before stays as it was"
    assert said_of_rates(short, long, 5)[0].startswith(stays)
    line = {"schedule": {"name": "linear"}, "optimizer": {"lr": 1.0}}
    (said,) = said_of_rates(line | short, line | long, 5)
    assert "step 6 had 0.5 by the checkpoint's recipe and has 0.75 now; the last step, 20, has 0.05" in said


def test_keys_that_change_what_is_learned_are_named():
    before = document(optimizer={"lr": 0.1}, save={"every": 5})[1]
    after = document(optimizer={"lr": 0.2}, save={"every": 7}, seed=3)[1]
    (said,) = changed_keys(before, after)
    assert "optimizer.lr (0.1 → 0.2), seed (0 → 3)" in said
    assert "save" not in said
    assert changed_keys(before, before) == []
