"""Where a run begins: at step 0, or where a checkpoint left it; and what changed since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from lora_kit.errors import RecipeError
from lora_kit.recipe import Recipe, ScheduleSection
from lora_kit.training.checkpoints.state import Progress, State, load_checkpoint, losses_known
from lora_kit.training.objects import ADAPTER, Run
from lora_kit.training.optimization.schedules import Rewarm, learning_rate_factor
from lora_kit.training.quantised_base import loss_line
from lora_kit.training.start import begin_at
from lora_kit.training.validation.measuring import Base, measure_base, measured_with

DATA_CHANGED = (
    "The pictures, captions or repeats are not those that the checkpoint was made with: the run goes on with what is "
    "there now, and is no longer the run that was begun."
)
# What does not change the weights that are learned, or is told in words of its own.
_NOT_TOLD = (
    "output_dir",
    "save",
    "validation",
    "schedule",
    "data.sources",
    "data.cache",
    "data.cache_dir",
    "data.workers",
    "data.on_error",
    "model.base",
    "train.max_steps",
    "train.resume",
    "train.overwrite",
    "train.log_every",
    "train.trackers",
    "train.tracker_project",
    "train.tracker_options",
    "train.non_finite",
    "train.max_non_finite",
    "train.wait_minutes",
)


MEASURED_ANEW = (
    "What is measured at validations is not what the checkpoint was measured with: the base was measured anew, and "
    "validations before this do not count for the best step."
)


class Start(NamedTuple):
    """Where the run goes on from."""

    progress: Progress
    notices: list[str]
    """What the user should know about it."""
    base: Base
    """What validations are compared with."""


def state_of(run: Run) -> State:
    """What of the run a checkpoint holds."""
    return State(run.trainable, run.average, run.learner.optimizer.optimizer, run.accelerator.scaler)


def begin(run: Run, checkpoint: Path | None) -> Start:
    """Load the checkpoint into the run, or measure the base. Raises TrainingError, RecipeError if they do not fit."""
    plan, recipe = run.plan_document, run.recipe.model_dump(mode="json")
    key = measured_with(run)
    known = losses_known(checkpoint, key) if checkpoint is not None else None
    base = measure_base(run, Base(*known) if known else None)  # before any weights are put in
    if checkpoint is None:
        progress = Progress(0, plan, base.held_out, run.data.fingerprint, run.base_hash, recipe)
        progress = replace(progress, train_base_losses=base.train, measured_with=key)
        told = loss_line(run.quantised, base.held_out)
        return Start(progress, [*told, *_begin_at_file(run)], base)
    progress = load_checkpoint(checkpoint, plan, run.base_hash, state_of(run))
    if progress.step > run.recipe.train.max_steps:
        raise RecipeError(
            f"train.max_steps: got {run.recipe.train.max_steps}, but {checkpoint} is at step {progress.step} already. "
            "Raise it, or resume from an older checkpoint."
        )
    rewarm = _rewarm(run.recipe, progress)
    now = replace(progress, data=run.data.fingerprint, recipe=recipe, rewarm=(rewarm.start, rewarm.steps))
    notices = [f"resumed from {checkpoint}, after step {progress.step}."]
    notices += [DATA_CHANGED] if progress.data != now.data else []
    notices += changed_keys(progress.recipe, recipe)
    notices += changed_rates(progress, now, run.recipe)
    if known is None:
        notices += [MEASURED_ANEW] if any("held_out_loss" in entry for entry in progress.history) else []
        now = _measured_anew(now, base, key)
    return Start(now, notices, base)


def _measured_anew(progress: Progress, base: Base, key: str) -> Progress:
    """With the base's new losses; of earlier validations only that they were, and this step's is repeated."""
    history: list[dict[str, float]] = [{"step": entry["step"]} for entry in progress.history]
    history = [entry for entry in history if entry["step"] != progress.step]
    losses = {"base_losses": base.held_out, "train_base_losses": base.train, "best_losses": [], "last_losses": []}
    return replace(progress, history=history, measured_with=key, **losses)


def _begin_at_file(run: Run) -> list[str]:
    if run.start is None:
        return []
    begin_at(run.bundle.components, ADAPTER, run.start)
    run.average.restart()
    return [f"begins at the weights of {run.recipe.model.adapter}: {len(run.start)} modules."]


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line that lists the recipe's keys that change what is learned; none if there are none."""
    old, new = dict(_flat(before)), dict(_flat(after))
    changed = [f"{key} ({old.get(key)} → {new.get(key)})" for key in sorted(old | new) if old.get(key) != new.get(key)]
    told = [line for line in changed if not _is_untold(line.partition(" ")[0])]
    if not told:
        return []
    return [
        f"The recipe is not the checkpoint's: {', '.join(told)}. The run goes on, no longer the one that was begun."
    ]


def changed_rates(before: Progress, now: Progress, recipe: Recipe) -> list[str]:
    """How the learning rate goes on, where `schedule` or `train.max_steps` changed or it is warmed up again."""
    old_schedule, old_steps = before.recipe["schedule"], int(before.recipe["train"]["max_steps"])
    old = ScheduleSection.model_validate(old_schedule)
    new, steps, step = recipe.schedule, recipe.train.max_steps, now.step
    ramp, old_ramp, rate = Rewarm(*now.rewarm), Rewarm(*before.rewarm), recipe.optimizer.lr

    def by_old(at: int) -> float:
        return before.recipe["optimizer"]["lr"] * learning_rate_factor(old, at, old_steps) * old_ramp.factor(at)

    def by_new(at: int) -> float:
        return rate * learning_rate_factor(new, at, steps) * ramp.factor(at)

    said = [f"train.max_steps: {old_steps} → {steps}."] if steps != old_steps else []
    if ramp.steps and ramp != old_ramp:
        said.append(f"schedule.rewarm_steps: the rate rises again over steps {step + 1} to {step + ramp.steps}.")
    planned = range(min(step, old_steps - 1), min(old_steps, steps))  # what the old curve still had, its end at least
    same = all(by_old(at) == by_new(at) for at in planned)
    if steps > step and not same:
        was = f"{by_old(step):.3g}" if step < old_steps else "none, its last step is done"
        said.append(
            f"The learning-rate curve changes: step {step + 1} had {was} by the checkpoint's recipe and has "
            f"{by_new(step):.3g} now; the last step, {steps}, has {by_new(steps - 1):.3g}."
        )
    elif said:
        last = f"; step {steps} has {by_new(steps - 1):.3g}" if steps > step else ""
        said.append(f"The learning rate of the steps that were planned before stays as it was{last}.")
    return [" ".join(said)] if said else []


def _rewarm(recipe: Recipe, progress: Progress) -> Rewarm:
    """The ramp that was begun, or a new one from here if the recipe asks for one of another length."""
    asked, begun = recipe.schedule.rewarm_steps, Rewarm(*progress.rewarm)
    return begun if asked == begun.steps else Rewarm(progress.step, asked)


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(cast("dict[str, Any]", value), f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _is_untold(key: str) -> bool:
    return any(key == untold or key.startswith(f"{untold}.") for untold in _NOT_TOLD)
