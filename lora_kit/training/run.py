"""A whole run: recipe → build → steps → result."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lora_kit.data import Batch, make_loader
from lora_kit.errors import LoraKitError, TrainingError
from lora_kit.files import write_text
from lora_kit.recipe import Recipe, dump_recipe
from lora_kit.targeting import plan_to_json
from lora_kit.training.build import Run, build_run
from lora_kit.training.checkpoints import (
    Progress,
    find_checkpoints,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from lora_kit.training.folder import RunFolder, checkpoint_to_resume, prepare_folder
from lora_kit.training.launch import build_accelerator
from lora_kit.training.metrics import Metrics, NoMetrics
from lora_kit.training.optimizers import learning_rate_factor, set_learning_rate
from lora_kit.training.result import write_result
from lora_kit.training.signals import InterruptedRunError, StopSignals
from lora_kit.training.step import StepMetrics, training_step
from lora_kit.training.validation import finish, measure_base, validate

DATA_CHANGED = (
    "The pictures, captions or repeats are not those that the checkpoint was made with: the run goes on with what is "
    "there now, and is no longer the run that was begun."
)


class Outcome(NamedTuple):
    """What a finished run left."""

    path: Path
    """adapter.safetensors, or the model folder of a full fine-tune."""
    figures: dict[str, Any]
    """What result.json holds."""
    is_main: bool
    """Whether this process wrote it."""

    def lines(self) -> list[str]:
        """The figures for a reader, a line each."""
        f = self.figures
        lines: list[str] = []
        if "held_out_loss" in f:
            lines.append(
                f"held-out loss {f['held_out_loss']:.4f}, base {f['held_out_base_loss']:.4f}, paired difference "
                f"{f['held_out_difference']:+.4f} ± {f['held_out_standard_error']:.4f}"
            )
        for strength in ("0", "1"):
            if f"top1_at_{strength}" in f:
                lines.append(
                    f"strength {strength}: mean saturation {f[f'saturation_at_{strength}']:.2f}; nearest of "
                    f"{f['held_out_pictures']} held-out pictures is the own one for {f[f'top1_at_{strength}']:.1%}, "
                    f"among the nearest five for {f[f'top5_at_{strength}']:.1%} (chance {f['chance_top1']:.1%})"
                )
        return lines


def train(recipe: Recipe) -> Outcome:
    """Train as the recipe says. Every process of an `accelerate launch` calls this.

    Raises LoraKitError for what the user can mend, TrainingError when the run cannot go on, InterruptedRunError after
    a signal, once the step is finished and saved.
    """
    accelerator = build_accelerator(recipe)
    folder = prepare_folder(recipe) if accelerator.is_main_process else RunFolder(Path(recipe.output_dir))
    checkpoint = checkpoint_to_resume(recipe)
    accelerator.wait_for_everyone()
    run = build_run(recipe, accelerator)
    plan = plan_to_json(run.plan)
    if checkpoint is not None:
        progress = load_checkpoint(checkpoint, plan, _tensors(run), run.learner.optimizer.optimizer)
        run.average.resume_at(progress.step)
        changed = progress.data != run.data.fingerprint
        progress = progress._replace(data=run.data.fingerprint)
    else:
        changed = False
        progress = Progress(0, plan, measure_base(run), run.data.fingerprint)
    if run.accelerator.is_main_process:
        write_text(folder.root / "recipe.yaml", dump_recipe(recipe))
        write_text(folder.root / "plan.json", json.dumps(plan, indent=1) + "\n")
    with _metrics(run, folder, progress.step) as metrics:
        for notice in [*run.notices, *([DATA_CHANGED] if changed else [])]:
            metrics.say(notice)
        try:
            return _train(run, folder, metrics, progress)
        finally:
            _list_skipped(run, folder, metrics)


def _train(run: Run, folder: RunFolder, metrics: Metrics, progress: Progress) -> Outcome:
    recipe, main = run.recipe, run.accelerator.is_main_process
    loader = make_loader(run.data, recipe, run.accelerator, first_step=progress.step)
    if progress.step == 0 and main:
        validate(run, folder, metrics, 0, progress.base_losses)
    with StopSignals() as signals:
        for step, batches in enumerate(loader, start=progress.step):
            done = _step(run, metrics, batches, step, stop=signals.number is not None)
            progress = progress._replace(step=step + 1)
            last = progress.step == recipe.train.max_steps
            if done.interrupted or last or _due(recipe.save.every, progress.step):
                _save(run, folder, progress)
            if done.interrupted and not last:
                raise _interrupted(folder, progress.step, signals.number)
            if main and not last and _due(recipe.validation.every, progress.step):
                validate(run, folder, metrics, progress.step, progress.base_losses)
    run.accelerator.wait_for_everyone()
    if not main:
        return Outcome(folder.root, {}, is_main=False)
    path = write_result(run, folder, progress.step)
    return Outcome(path, finish(run, folder, metrics, progress.base_losses), is_main=True)


def _step(run: Run, metrics: Metrics, batches: list[Batch], step: int, stop: bool) -> StepMetrics:
    recipe = run.recipe
    factor = learning_rate_factor(recipe.schedule, step, recipe.train.max_steps)
    set_learning_rate(run.learner.optimizer, factor)
    try:
        done = training_step(run.learner, batches, step, stop)
    except TrainingError as error:
        raise TrainingError(f"{error} {_last_good(run)} Nothing was overwritten.") from error
    run.average.update()
    metrics.advance(step + 1)
    if _due(recipe.train.log_every, step + 1) or step + 1 == recipe.train.max_steps:
        values = {"loss": done.loss, "lr": recipe.optimizer.lr * factor, "grad_norm": done.grad_norm}
        metrics.log_step(step + 1, run.data.order.mean_batch_size, values)
    return done


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _save(run: Run, folder: RunFolder, progress: Progress) -> None:
    if run.accelerator.is_main_process:
        save_checkpoint(folder.checkpoints, progress, _tensors(run), run.learner.optimizer.optimizer)
        remove_old_checkpoints(folder.checkpoints, run.recipe.save.keep)
    run.accelerator.wait_for_everyone()


def _tensors(run: Run) -> dict[str, Tensor]:
    return {**run.trainable, **run.average.tensors()}


def _interrupted(folder: RunFolder, step: int, number: int | None) -> LoraKitError:
    number = number or signal.SIGTERM  # another process got it
    where = folder.checkpoints / f"step-{step:06d}"
    return InterruptedRunError(
        f"Stopped by {signal.Signals(number).name} after step {step}; saved {where}. Go on with train.resume=latest.",
        number,
    )


def _last_good(run: Run) -> str:
    found = find_checkpoints(RunFolder(Path(run.recipe.output_dir)).checkpoints)
    if not found:
        return "There is no checkpoint yet. Try a lower optimizer.lr."
    return f"Last good checkpoint: {found[-1]}. Try a lower optimizer.lr with train.resume=latest."


def _metrics(run: Run, folder: RunFolder, first_step: int) -> Metrics:
    if not run.accelerator.is_main_process:
        return NoMetrics()
    return Metrics(folder.root, first_step, run.recipe.train.max_steps)


def _list_skipped(run: Run, folder: RunFolder, metrics: Metrics) -> None:
    skipped = run.skipped
    if not skipped:
        return
    metrics.say(f"skipped {len(skipped)} pictures (data.on_error: skip); also in {folder.skipped}:")
    lines = [f"{name}: {reason}" for name, reason in skipped]
    for line in lines[:20] + ([f"… {len(lines) - 20} more"] if len(lines) > 20 else []):
        metrics.say(f"  {line}")
    if run.accelerator.is_main_process:
        write_text(folder.skipped, "\n".join(lines) + "\n")
