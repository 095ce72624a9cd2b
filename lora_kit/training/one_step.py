"""One optimizer step of a run: its rate, what follows the update, and what is logged of it."""

from __future__ import annotations

from lora_kit.data import Batch
from lora_kit.errors import TrainingError
from lora_kit.training.checkpoints.saving import last_whole
from lora_kit.training.checkpoints.state import Progress
from lora_kit.training.folder import RunFolder
from lora_kit.training.metrics import Metrics
from lora_kit.training.objects import Run
from lora_kit.training.optimization.max_norm import limit_norms
from lora_kit.training.optimization.optimizers import set_learning_rate
from lora_kit.training.optimization.schedules import Rewarm, learning_rate_factor
from lora_kit.training.step import StepMetrics, training_step


def is_due(every: int, step: int) -> bool:
    """Whether what comes each `every` steps (0: never) comes after this one."""
    return every > 0 and step % every == 0


def take_step(
    run: Run, folder: RunFolder, metrics: Metrics, batches: list[Batch], progress: Progress, stop: bool
) -> StepMetrics:
    """Run step `progress.step` and log it. stop: this process was asked to stop after it.

    Raises TrainingError for a step that is not finite, where the recipe does not go on over it.
    """
    recipe, step = run.recipe, progress.step
    if run.tokens is not None:
        run.tokens.unfreeze(step)
    factor = learning_rate_factor(recipe.schedule, step, recipe.train.max_steps)
    factor *= Rewarm(*progress.rewarm).factor(step)
    set_learning_rate(run.learner.optimizer, factor)
    done = training_step(run.learner, batches, step, stop)
    metrics.advance(step + 1)
    if done.problem:
        _tell_skipped(run, folder, metrics, progress, done)
        return done
    if done.overflowed:
        metrics.log(step + 1, {"skipped": "fp16 gradients overflowed; the loss scale is halved"})
    norms = None
    if not done.overflowed:
        norms = limit_norms(run.limited)
        if run.tokens is not None:
            run.tokens.decay_norms(step)
        run.average.update()
    if is_due(recipe.train.log_every, step + 1) or step + 1 == recipe.train.max_steps:
        values = {"loss": done.loss, "lr": recipe.optimizer.lr * factor, "grad_norm": done.grad_norm}
        estimate = run.learner.optimizer.param_groups[0].get("d")
        if isinstance(estimate, float):  # Prodigy's: the step it takes is lr × this
            values["prodigy_d"] = estimate
        if norms is not None:
            values |= {"norms_limited": float(norms.scaled), "mean_norm": float(norms.mean)}
        metrics.log_step(step + 1, run.data.order.mean_batch_size, values)
    return done


def _tell_skipped(run: Run, folder: RunFolder, metrics: Metrics, progress: Progress, done: StepMetrics) -> None:
    """Log a step that was left out. Raises TrainingError if the recipe does not go on over it."""
    section, row = run.recipe.train, progress.skipped_in_row + 1
    if section.non_finite == "stop" or row > section.max_non_finite:
        many = f" Such steps in a row: {row}, and train.max_non_finite is {section.max_non_finite}." if row > 1 else ""
        raise TrainingError(
            f"{done.problem}{many} {last_whole(folder)}Try a lower optimizer.lr. Nothing was overwritten."
        )
    metrics.say(f"{done.problem} Skipped, {row} in a row (train.non_finite: skip).")
    metrics.log(progress.step + 1, {"skipped": done.problem})
