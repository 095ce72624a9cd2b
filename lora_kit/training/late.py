"""A step that waits for no GPU: all of it is queued, and what it measured is read later.

Whether an update happens is decided where the gradients are. torch's fused Adam takes the decision as a tensor
(`found_inf`, which its loss scaler uses), and leaves weights, moments and step count as they are where it is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from lora_kit.data import Batch
from lora_kit.models.moving import QUEUES
from lora_kit.training.step import (
    Learner,
    StepMetrics,
    clip,
    gradient_problem,
    learn,
    loss_problem,
)

_DECIDES = (torch.optim.AdamW, torch.optim.Adam)
"""Fused SGD takes the decision too, but leaves a momentum that it never began unfilled."""


def reads_late(accelerator: Accelerator, optimizer: Any) -> bool:
    """Whether a run's steps can be read late: on a GPU, in one process, without fp16's loss scaler, by an optimizer
    that decides on the device. optimizer: as torch made it.

    Several processes read every step: each must know whether another was asked to stop.
    """
    decides = type(optimizer) in _DECIDES and all(group.get("fused") for group in optimizer.param_groups)
    alone = accelerator.num_processes == 1 and accelerator.scaler is None
    return decides and alone and accelerator.device.type in QUEUES


class HostCopy:
    """Numbers on their way to the CPU."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)  # into page-locked memory
        self._done = torch.cuda.Event() if values.is_cuda else None
        if self._done is not None:
            self._done.record()

    def read(self) -> list[float]:
        """Waits for what was queued before the copy, not for what is queued behind."""
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()


class QueuedStep(NamedTuple):
    """An optimizer step, of which the device may not have begun."""

    step: int
    """0-based."""
    held: Tensor
    """bool, on the device: loss or gradient is not finite, so that nothing was updated."""
    values: Tensor
    """float32 [2 + m], on the device: the loss, the gradient's norm, and each of m micro-batches' part of the loss."""
    samples: Sequence[Sequence[str]]
    """Of each micro-batch."""

    def metrics(self, values: Sequence[float]) -> StepMetrics:
        """`values`, read, as `training_step` tells them."""
        loss, norm, *parts = values
        if not math.isfinite(loss):
            return StepMetrics(loss, math.nan, False, loss_problem(self.step, loss, parts, self.samples))
        problem = gradient_problem(self.step, loss, norm) if not math.isfinite(norm) else ""
        return StepMetrics(loss, norm, False, problem)


def queue_step(
    learner: Learner, micro_batches: Sequence[Batch], step: int, before_update: Callable[[], None]
) -> QueuedStep:
    """`training_step` without a wait: the same operations, and the same update or none.

    before_update: called once the passes are queued and before the weights change. What waits there for the step
    before leaves the device at work.
    """
    losses = learn(learner, micro_batches, step)
    loss, norm = torch.stack(losses).sum(), clip(learner)
    held = (loss.isfinite() & norm.isfinite()).logical_not()
    before_update()
    _update(learner.optimizer, held)
    return QueuedStep(step, held, torch.stack([loss, norm, *losses]), [batch.ids for batch in micro_batches])


def _update(optimizer: Any, held: Tensor) -> None:
    """optimizer: as Accelerate wraps it."""
    own = optimizer.optimizer
    own.found_inf = held.float()
    try:
        optimizer.step()
    finally:
        del own.found_inf
    optimizer.zero_grad(set_to_none=True)
