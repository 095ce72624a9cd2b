"""One optimizer step of a run: its rate, what follows the update, and what is logged of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple

import torch

from lora_kit.data import Batch
from lora_kit.errors import TrainingError
from lora_kit.recipe import Recipe
from lora_kit.training.checkpoints.saving import last_whole
from lora_kit.training.checkpoints.state import Progress
from lora_kit.training.folder import RunFolder
from lora_kit.training.late import HostCopy, QueuedStep, queue_step
from lora_kit.training.metrics import Metrics
from lora_kit.training.objects import Run
from lora_kit.training.optimization.max_norm import NormReport, limit_norms
from lora_kit.training.optimization.optimizers import set_learning_rate
from lora_kit.training.optimization.schedules import Rewarm, learning_rate_factor
from lora_kit.training.step import StepMetrics, training_step


def is_due(every: int, step: int) -> bool:
    """Whether what comes each `every` steps (0: never) comes after this one."""
    return every > 0 and step % every == 0


def is_looked_at(recipe: Recipe, step: int) -> bool:
    """Whether something reads the run after `step` steps: a checkpoint, a validation, the result."""
    every = (recipe.save.every, recipe.validation.every)
    return step == recipe.train.max_steps or any(is_due(one, step) for one in every)


class _Unread(NamedTuple):
    """A step of which nothing was read yet."""

    queued: QueuedStep
    values: HostCopy
    """The step's own, and behind them a NormReport's, if there are limits."""
    factor: float
    """Of the learning rate."""


class Steps:
    """A run's optimizer steps, one after the other.

    Where the learner reads late, a step is read while the device is at the next one's passes, and before anything looks
    at the run: what is logged, averaged, skipped and saved is what it would be if each step were read at once. A
    context manager: on leaving, the last step is read.
    """

    def __init__(self, run: Run, folder: RunFolder, metrics: Metrics, skipped_in_row: int = 0) -> None:
        """skipped_in_row: as `Progress` has it."""
        self.run, self.folder, self.metrics = run, folder, metrics
        self.skipped_in_row = skipped_in_row
        """Steps just before this that were left out, as far as they are read."""
        self.interrupted = False
        """Some process was asked to stop."""
        self._unread: _Unread | None = None

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.settle()

    def take(self, batches: Sequence[Batch], step: int, factor: float, stop: bool) -> None:
        """Step `step` (0-based) at `factor` times the recipe's rate. stop: this process was asked to stop after it.

        Raises TrainingError for a step that is not finite, this or one before, where the recipe does not go on over it.
        """
        if self.run.tokens is not None:
            if self.run.tokens.ends_at(step):
                self.settle()  # while the average still sees which rows learned
            self.run.tokens.unfreeze(step)
        set_learning_rate(self.run.learner.optimizer, factor)
        if not self.run.learner.reads_late:
            self._take_at_once(batches, step, factor, stop)
            return
        queued = queue_step(self.run.learner, batches, step, before_update=self.settle)
        norms = limit_norms(self.run.limited, queued.held)
        if self.run.tokens is not None:
            self.run.tokens.decay_norms(step, queued.held)
        self.metrics.advance(step + 1)
        self.interrupted = stop
        behind = [] if norms is None else [norms.scaled.float(), norms.mean]
        self._unread = _Unread(queued, HostCopy(torch.stack([*queued.values, *behind])), factor)
        if stop or is_looked_at(self.run.recipe, step + 1):
            self.settle()

    def settle(self) -> None:
        """Read the step that is not read yet, if there is one, and do what follows it. Raises as `take`."""
        if self._unread is None:
            return
        (queued, copied, factor), self._unread = self._unread, None
        values, own = copied.read(), len(queued.values)
        norms = NormReport(*torch.tensor(values[own:])) if self.run.limited else None
        done = queued.metrics(values[:own])
        if self._goes_on(done, queued.step):
            self._finish(done, queued.step, factor, norms)

    def _take_at_once(self, batches: Sequence[Batch], step: int, factor: float, stop: bool) -> None:
        done = training_step(self.run.learner, batches, step, stop)
        self.metrics.advance(step + 1)
        self.interrupted = done.interrupted
        if not self._goes_on(done, step):
            return
        norms = None
        if done.overflowed:
            self.metrics.log(step + 1, {"skipped": "fp16 gradients overflowed; the loss scale is halved"})
        else:
            norms = limit_norms(self.run.limited)
            if self.run.tokens is not None:
                self.run.tokens.decay_norms(step)
        self._finish(done, step, factor, norms)

    def _goes_on(self, done: StepMetrics, step: int) -> bool:
        """Whether the step was taken. Where it was left out: log that, or raise TrainingError as the recipe says."""
        if not done.problem:
            self.skipped_in_row = 0
            return True
        self.skipped_in_row += 1
        section, row = self.run.recipe.train, self.skipped_in_row
        if section.non_finite == "stop" or row > section.max_non_finite:
            limit = f"and train.max_non_finite is {section.max_non_finite}"
            many = f" Such steps in a row: {row}, {limit}." if row > 1 else ""
            raise TrainingError(
                f"{done.problem}{many} {last_whole(self.folder)}Try a lower optimizer.lr. Nothing was overwritten."
            )
        self.metrics.say(f"{done.problem} Skipped, {row} in a row (train.non_finite: skip).")
        self.metrics.log(step + 1, {"skipped": done.problem})
        return False

    def _finish(self, done: StepMetrics, step: int, factor: float, norms: NormReport | None) -> None:
        """Average the weights, and log the step where that is due."""
        run, recipe = self.run, self.run.recipe
        if not done.overflowed:
            run.average.update()
        if not is_due(recipe.train.log_every, step + 1) and step + 1 != recipe.train.max_steps:
            return
        values = {"loss": done.loss, "lr": recipe.optimizer.lr * factor}
        if not done.overflowed:
            values["grad_norm"] = done.grad_norm
        estimate = run.learner.optimizer.param_groups[0].get("d")
        if isinstance(estimate, float):  # Prodigy's: the step it takes is lr × this
            values["prodigy_d"] = estimate
        if norms is not None:
            values |= {"norms_limited": float(norms.scaled), "mean_norm": float(norms.mean)}
        self.metrics.log_step(step + 1, run.data.order.mean_batch_size, values)


def take_step(steps: Steps, batches: Sequence[Batch], progress: Progress, stop: bool) -> Progress:
    """Take step `progress.step`; the progress after it. Raises as `Steps.take`.

    Of a step that is read late, whether it was left out stands in the progress once anything looks at it.
    """
    recipe, step = steps.run.recipe, progress.step
    factor = learning_rate_factor(recipe.schedule, step, recipe.train.max_steps)
    factor *= Rewarm(*progress.rewarm).factor(step)
    steps.take(batches, step, factor, stop)
    return replace(progress, step=step + 1, skipped_in_row=steps.skipped_in_row)
