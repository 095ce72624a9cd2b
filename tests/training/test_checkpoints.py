"""Checkpoints on the disk: whole or not there, recognised when damaged, removed when old."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_kit.errors import TrainingError
from lora_kit.recipe import TrainSection
from lora_kit.training.checkpoints.folders import (
    best_checkpoint,
    damage,
    find_checkpoints,
    mark_best,
    newest_whole,
    remove_old,
    set_damaged_aside,
    tidy,
)
from lora_kit.training.checkpoints.state import Progress, State, load_checkpoint, save_checkpoint
from lora_kit.training.optimization.ema import WeightAverage

FILES = ["ema.safetensors", "optimizer.safetensors", "state.json", "trainable.safetensors"]


def state(seed: int, scaler: torch.amp.GradScaler | None = None) -> State:
    """A trained weight, its average and AdamW's moments, all different for each seed."""
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    average = WeightAverage({"w": weight}, TrainSection(ema_decay=0.5))
    for _ in range(seed):
        weight.grad = torch.randn(3, 4)
        optimizer.step()
        average.update()
    return State({"w": weight}, average, optimizer, scaler)


def progress(step: int, **changes) -> Progress:
    return Progress(step, {"targets": []}, [0.5], "data", "base", {"seed": 0}, **changes)


def saved(folder: Path, *steps: int) -> list[Path]:
    return [save_checkpoint(folder, progress(step), state(step)) for step in steps]


def test_everything_comes_back_bit_for_bit(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 96.0, "_growth_tracker": 7})
    history = [{"step": 2, "held_out_loss": 0.25, "held_out_standard_error": 1e-17}]
    before = state(3, scaler)
    told = progress(3, history=history, skipped_in_row=2, rewarm=(1, 5))
    path = save_checkpoint(tmp_path, told, before)
    after = state(1, torch.amp.GradScaler("cpu"))
    assert load_checkpoint(path, {"targets": []}, "base", after) == told
    assert torch.equal(after.trainable["w"], before.trainable["w"])
    assert torch.equal(after.average.tensors()["w"], before.average.tensors()["w"])
    assert not torch.equal(before.average.tensors()["w"], before.trainable["w"])
    assert after.average.updates == 3
    assert after.scaler.state_dict() == scaler.state_dict()
    moments = [s.optimizer.state_dict()["state"][0] for s in (before, after)]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_the_manifest_names_every_file(tmp_path):
    (path,) = saved(tmp_path, 1)
    assert sorted(json.loads((path / "manifest.json").read_text())["files"]) == FILES
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "manifest.json"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_any_harm_to_any_file_is_recognised_and_the_one_before_it_is_used(tmp_path, name, harm):
    old, new = saved(tmp_path, 1, 2)
    assert newest_whole(tmp_path) == new
    harm(new / name)
    assert damage(new)
    assert name == "manifest.json" or damage(new).startswith(name)
    assert newest_whole(tmp_path) == old
    with pytest.raises(TrainingError, match=r"is not a whole checkpoint.*train\.resume=latest"):
        load_checkpoint(new, {"targets": []}, "base", state(1))


def test_damaged_ones_are_set_aside_and_said_down_to_a_whole_one(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    for step in (1, 3, 4):
        flip(tmp_path / f"step-{step:06d}" / "trainable.safetensors")
    said = set_damaged_aside(tmp_path)
    assert [line.split()[1] for line in said] == ["step-000004", "step-000003"]
    assert all("trainable.safetensors is not what was written" in line for line in said)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000001", "step-000002"]
    assert (tmp_path / "damaged-step-000004" / "trainable.safetensors").exists()  # nothing is thrown away


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    saved(tmp_path, 1, 2)
    mark_best(tmp_path, "step-000001")
    for step in (3, 4):
        saved(tmp_path, step)
        remove_old(tmp_path, step, keep=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000001", "step-000003", "step-000004"]
    assert (tmp_path / "best" / "state.json").is_file()
    mark_best(tmp_path, "step-000004")
    assert best_checkpoint(tmp_path) == tmp_path / "step-000004"
    remove_old(tmp_path, 4, keep=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000003", "step-000004"]


def test_checkpoints_of_later_steps_are_no_reason_to_remove_earlier_ones(tmp_path):
    saved(tmp_path, 2, 3, 8, 9)  # the run went back to step 2
    remove_old(tmp_path, 3, keep=2)
    assert len(find_checkpoints(tmp_path)) == 4


def test_best_is_a_file_where_links_cannot_be_made(tmp_path, monkeypatch):
    saved(tmp_path, 1)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    mark_best(tmp_path, "step-000001")
    assert best_checkpoint(tmp_path) == tmp_path / "step-000001"
    mark_best(tmp_path, None)
    assert best_checkpoint(tmp_path) is None


def test_what_a_killed_process_left_is_put_right(tmp_path):
    first, second = saved(tmp_path, 1, 2)
    second.rename(tmp_path / ".step-000002.aside")  # killed between two renames
    shutil.copytree(first, tmp_path / ".step-000001.aside")  # killed after them
    (tmp_path / ".step-000003.77.tmp").mkdir()
    (tmp_path / ".step-000000.removed").mkdir()
    (tmp_path / ".best.77.tmp").symlink_to("step-000001")
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert damage(second) == ""


def test_a_save_that_fails_leaves_the_others_and_nothing_of_itself(tmp_path, monkeypatch):
    (path,) = saved(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_kit.training.checkpoints.state.write_manifest", full)
    with pytest.raises(OSError, match="No space"):
        saved(tmp_path, 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000001"]
    assert damage(path) == ""


@pytest.mark.parametrize(
    ("plan", "base", "said"), [({"targets": [1]}, "base", "other targets"), ({"targets": []}, "other", "another base")]
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, plan, base, said):
    (path,) = saved(tmp_path, 1)
    with pytest.raises(TrainingError, match=said):
        load_checkpoint(path, plan, base, state(1))


def test_a_checkpoint_without_the_average_that_is_asked_for_is_refused(tmp_path):
    (path,) = saved(tmp_path, 1)
    plain = state(1)
    plain = plain._replace(average=WeightAverage(plain.trainable, TrainSection()))
    with pytest.raises(TrainingError, match=r"train\.ema_decay was set or removed"):
        load_checkpoint(path, {"targets": []}, "base", plain)


def test_the_best_is_the_first_of_the_lowest_losses():
    history = [{"step": 0}, {"step": 5, "held_out_loss": 0.2}, {"step": 10, "held_out_loss": 0.2}]
    assert progress(10, history=history).best == history[1]
    assert progress(10, history=history).validated
    assert not progress(11, history=history).validated
    assert progress(10, history=history[:1]).best is None
