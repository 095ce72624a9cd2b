"""Steps that are read late: what a run writes is what it writes where each step is read at once.

On a CPU, which has nothing to wait for, by telling the run that it has; the code is the GPU's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from lora_kit.errors import TrainingError
from lora_kit.recipe import Recipe
from lora_kit.training import late, one_step, train
from lora_kit.training import step as step_module
from lora_kit.training.build import build_run
from lora_kit.training.objects import Run
from lora_kit.training.probe import made_up
from lora_kit.training.processes.signals import InterruptedRunError
from lora_kit.training.step import training_step

SEEN_LATE = ("save.every=5", "train.max_steps=7")
"""Five steps in a row that nothing looks at, then two."""


@pytest.fixture
def read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting(monkeypatch)


def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late, "QUEUES", {"cpu"})


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int, gradient: bool = False) -> None:
    """The losses of these steps (0-based), or only their gradients, are not finite."""
    sound = step_module._backward

    def spoilt(learner: Any, batch: Any, at: int) -> torch.Tensor:
        loss = sound(learner, batch, at)
        if at in steps and gradient:
            learner.parameters[0].grad.view(-1)[0] = torch.inf
        return loss * (torch.nan if at in steps and not gradient else 1.0)

    monkeypatch.setattr(step_module, "_backward", spoilt)


def rows(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without the speed."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "samples_per_s"} for row in found]


def files(folder: Path) -> dict[str, Any]:
    """Every tensor of the run's checkpoints and of its result, and each checkpoint's document."""
    found: dict[str, Any] = {}
    for path in [*folder.glob("checkpoints/*/*.safetensors"), *folder.glob("*.safetensors")]:
        found |= {f"{path.relative_to(folder)}:{name}": value for name, value in load_file(path).items()}
    for path in folder.glob("checkpoints/*/state.json"):
        document = json.loads(path.read_text())
        document["recipe"].pop("output_dir")
        found[str(path.relative_to(folder))] = document
    return found


def same(first: Path, second: Path) -> bool:
    """Row by row, bit by bit."""
    one, other = files(first), files(second)
    assert rows(first) == rows(second)
    assert one.keys() == other.keys()
    assert any(name.startswith("checkpoints/") for name in one)
    return all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def both_ways(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, root: Path, *overrides: str
) -> tuple[Path, Path]:
    """The run read at once, and the run read late: that the second one was is seen."""
    train(make_recipe(*SEEN_LATE, *overrides, name="once"))
    behind = list[int]()
    settle = one_step.Steps.settle

    def counted(steps: one_step.Steps) -> None:
        behind.append(steps._unread is not None)
        settle(steps)

    with monkeypatch.context() as patch:
        waiting(patch)
        patch.setattr(one_step.Steps, "settle", counted)
        train(make_recipe(*SEEN_LATE, *overrides, name="late"))
    assert sum(behind) == 7  # each step is read once …
    assert [bool(one) for one in behind[:2]] == [False, True]  # … and the first by the second
    return root / "once", root / "late"


KINDS = {
    "plain": ("train.log_every=1",),
    "seldom logged": ("train.log_every=3", "optimizer.max_grad_norm=0"),
    "several micro-batches": ("train.micro_batch_size=1",),
    "limited norms": ('targets=[{match: "unet.**.attn*.to_{q,k}", rank: 4, max_norm: 0.01}]',),
    "averaged": ("train.ema_decay=0.9",),
    "tokens": (
        "tokens=[{token: <t>, initializer: random, norm_decay: 0.1, until: 3}, {token: <u>, initializer: random}]",
        "data.trigger='<t> <u>'",
        "train.ema_decay=0.9",
    ),
    "two rates": ("optimizer.lr_ratio=4", "schedule={name: linear}"),
}


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_rows_checkpoints_and_result_are_the_same(make_recipe, tmp_path, monkeypatch, overrides):
    assert same(*both_ways(make_recipe, monkeypatch, tmp_path, *overrides))


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_steps_left_out_are_told_and_leave_nothing_behind(make_recipe, tmp_path, monkeypatch, gradient):
    # The second and third step, one that a checkpoint follows, and the last one.
    spoil(monkeypatch, 1, 2, 4, 6, gradient=gradient)
    limited = 'targets=[{match: "unet.**.attn*.to_{q,k}", rank: 4, max_norm: 0.01}]'
    # A token that learns until the step before a skipped one: the average must be of that step's update.
    own = "tokens=[{token: <t>, initializer: random, norm_decay: 0.1, until: 4}, {token: <u>, initializer: random}]"
    kept = ("train.non_finite=skip", "train.ema_decay=0.9", limited, own, "data.trigger='<t> <u>'")
    assert same(*both_ways(make_recipe, monkeypatch, tmp_path, *kept))
    assert [row["step"] for row in rows(tmp_path / "late") if "skipped" in row] == [2, 3, 5, 7]


def test_a_skipped_step_changes_no_bit_of_weights_and_moments(make_recipe, read_late, monkeypatch):
    recipe = make_recipe("train.max_steps=9")
    run = build_run(recipe, Accelerator(cpu=True))
    assert run.learner.reads_late
    batches = made_up(run, run.accelerator)
    queue(run, batches, 0)
    before = state(run)
    spoil(monkeypatch, 1, 2)
    queued = queue(run, batches, 1)
    assert bool(queued.held)
    assert all(torch.equal(new, old) for new, old in zip(state(run), before, strict=True))
    assert not bool(queue(run, batches, 3).held)
    assert not all(torch.equal(new, old) for new, old in zip(state(run), before, strict=True))


def queue(run: Run, batches: list[Any], step: int) -> late.QueuedStep:
    return late.queue_step(run.learner, batches, step, before_update=lambda: None)


def state(run: Run) -> list[torch.Tensor]:
    """Weights, moments and counts."""
    moments = [value for one in run.learner.optimizer.state.values() for value in one.values()]
    return [value.detach().clone() for value in [*run.learner.parameters, *moments]]


def test_a_step_that_is_not_finite_stops_the_run_with_the_same_words_and_nothing_after_it(
    make_recipe, tmp_path, monkeypatch
):
    spoil(monkeypatch, 2)
    messages, left = list[str](), list[set[str]]()
    for name in ("once", "late"):
        with monkeypatch.context() as patch, pytest.raises(TrainingError) as caught:
            if name == "late":
                waiting(patch)
            train(make_recipe("train.max_steps=7", "save.every=2", name=name))
        messages.append(str(caught.value).replace(str(tmp_path / name), ""))
        left.append({path.name for path in (tmp_path / name / "checkpoints").iterdir()})
        assert not (tmp_path / name / "adapter.safetensors").exists()
    assert messages[0] == messages[1]
    assert "The loss of step 3 is nan" in messages[0]
    assert left == [{"step-000002"}] * 2
    assert rows(tmp_path / "once") == rows(tmp_path / "late")


def test_no_weight_is_touched_by_the_step_that_finds_the_one_before_it_was_not_finite(
    make_recipe, read_late, tmp_path, monkeypatch
):
    kept = dict[str, Any]()
    sound = one_step.queue_step

    def watched(learner: Any, batches: Any, step: int, before_update: Any) -> Any:
        if step == 1:
            kept["weights"] = [weight.detach().clone() for weight in learner.parameters]
        if step == 3:
            kept["learner"] = learner
        return sound(learner, batches, step, before_update)

    monkeypatch.setattr(one_step, "queue_step", watched)
    spoil(monkeypatch, 1, 2)
    settings = ("train.non_finite=skip", "train.max_non_finite=1", "save.every=0", "train.max_steps=7")
    with pytest.raises(TrainingError, match=r"step 3 is nan.*in a row: 2"):
        train(make_recipe(*settings))
    weights = kept["learner"].parameters  # of step 2, as step 4 left them
    assert all(torch.equal(now, before) for now, before in zip(weights, kept["weights"], strict=True))


def test_too_many_in_a_row_are_counted_over_a_resume(make_recipe, read_late, tmp_path, monkeypatch):
    limits = ("train.non_finite=skip", "train.max_non_finite=2", "save.every=1")
    spoil(monkeypatch, 1, 2, 3)
    with pytest.raises(TrainingError, match=r"step 4 is nan.*in a row: 3, .*max_non_finite is 2.*step-000003"):
        train(make_recipe(*limits))
    with pytest.raises(TrainingError, match="in a row: 3"):
        train(make_recipe(*limits, "train.resume=latest"))


def test_a_run_that_was_stopped_by_a_signal_goes_on_to_the_same_result(make_recipe, tmp_path, monkeypatch):
    assert same(*both_ways(make_recipe, monkeypatch, tmp_path))
    waiting(monkeypatch)
    sound, stops = one_step.queue_step, list[int]()

    def stopped(learner: Any, batches: Any, step: int, before_update: Any) -> Any:
        stops.append(step)
        return sound(learner, batches, step, before_update)

    monkeypatch.setattr(one_step, "queue_step", stopped)
    monkeypatch.setattr("lora_kit.training.run.StopSignals", lambda: Asked(stops, 2))
    with pytest.raises(InterruptedRunError):
        train(make_recipe(*SEEN_LATE, name="parted"))
    assert stops == [0, 1, 2]
    assert [row["step"] for row in rows(tmp_path / "parted")] == [1, 2, 3]
    monkeypatch.setattr("lora_kit.training.run.StopSignals", lambda: Asked(stops, 99))
    train(make_recipe(*SEEN_LATE, "train.resume=latest", name="parted"))
    assert rows(tmp_path / "parted") == rows(tmp_path / "once")
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("once", "parted"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


class Asked:
    """Stands for the signals: the run is asked to stop before its step `at`."""

    def __init__(self, steps: list[int], at: int) -> None:
        self.steps, self.at = steps, at

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def number(self) -> int | None:
        """The signal's."""
        return 15 if len(self.steps) >= self.at else None


def test_the_last_step_is_logged_though_the_next_ones_pictures_cannot_be_read(
    make_recipe, read_late, tmp_path, monkeypatch
):
    from lora_kit.training import run as run_module

    sound = run_module.make_loader

    def broken(*arguments: Any, **options: Any) -> Any:
        loader = sound(*arguments, **options)
        yield from (next(loader) for _ in range(3))
        raise OSError("the disk is gone")

    monkeypatch.setattr(run_module, "make_loader", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        train(make_recipe(*SEEN_LATE))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]


AT_ONCE = {
    "prodigy": ("optimizer.name=prodigy", "optimizer.lr=1"),
    "without a fused update": ("optimizer.args={foreach: true}",),
    "sgd": ("optimizer.name=torch.optim.SGD",),
    "schedule-free": ("optimizer.name=schedulefree.AdamWScheduleFree",),
}


@pytest.mark.parametrize("overrides", AT_ONCE.values(), ids=AT_ONCE)
def test_an_optimizer_that_cannot_decide_on_the_device_is_read_at_once(make_recipe, read_late, overrides):
    assert not build_run(make_recipe(*overrides), Accelerator(cpu=True)).learner.reads_late


def test_fp16_and_several_processes_are_read_at_once_and_so_is_a_cpu(make_recipe, monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    accelerator: Any = Stub()
    assert late.reads_late(accelerator, optimizer)
    assert not late.reads_late(Stub(num_processes=2), optimizer)
    assert not late.reads_late(Stub(scaler=object()), optimizer)
    assert not late.reads_late(Stub(device=torch.device("cpu")), optimizer)


class Stub:
    """Stands for an Accelerator of one process on a GPU."""

    def __init__(self, num_processes: int = 1, scaler: Any = None, device: torch.device | None = None) -> None:
        self.num_processes, self.scaler, self.device = num_processes, scaler, device or torch.device("cuda")


def test_an_overflow_of_fp16_is_seen_though_the_fused_update_leaves_the_step_out_by_itself(make_recipe, monkeypatch):
    run = build_run(make_recipe(), Accelerator(cpu=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator: Any = run.accelerator
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setattr(type(accelerator), "mixed_precision", property(lambda self: "fp16"))
    wrapped = type(run.learner.optimizer)(run.learner.optimizer.optimizer, scaler=scaler)
    learner = run.learner._replace(optimizer=wrapped)
    monkeypatch.setattr(accelerator, "_optimizers", [wrapped])
    batches = made_up(run, accelerator)
    before = [weight.detach().clone() for weight in learner.parameters]
    spoil(monkeypatch, 0, gradient=True)
    done = training_step(learner, batches, 0)
    assert done.overflowed
    assert not done.problem
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(now, old) for now, old in zip(learner.parameters, before, strict=True))
    done = training_step(learner, batches, 1)
    assert not done.overflowed
    assert not all(torch.equal(now, old) for now, old in zip(learner.parameters, before, strict=True))
