"""One optimizer step, flat: micro-batches → losses → backward → sum over processes → clip → update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_kit.adapters import without_adapters
from lora_kit.data import Batch
from lora_kit.diffusion import seed_for
from lora_kit.models import ModelBundle
from lora_kit.models.moving import moved, rows_on
from lora_kit.training.conditions import Conditions
from lora_kit.training.objective import (
    Noised,
    Objective,
    beside_latents,
    draw,
    latent_moments,
    noised_latents,
    sample_losses,
    wanted_prediction,
)
from lora_kit.training.processes.sharding import is_sharded, whole

BUCKET = 2**26
"""Elements of gradient summed over processes at a time: 256 MiB, beside a whole network's 3.4 GB."""


class Learner(NamedTuple):
    """Everything a step needs that does not change from step to step."""

    accelerator: Accelerator
    bundle: ModelBundle
    objective: Objective
    conditions: Conditions
    optimizer: Any
    parameters: list[nn.Parameter]
    """Every trainable parameter, in one fixed order."""
    max_grad_norm: float
    seed: int
    reads_late: bool = False
    """Whether what a step measured is read after the next one's passes are queued (`late.py`)."""


class StepMetrics(NamedTuple):
    """What one optimizer step measured."""

    loss: float
    """Mean over the step's samples, all processes, each with its weight."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    interrupted: bool
    """Some process was asked to stop."""
    problem: str = ""
    """What was not finite, so that no weight was touched; empty after a step like any other."""
    overflowed: bool = False
    """fp16: the gradients did not fit, no weight was touched, and the loss scale was halved."""


def training_step(learner: Learner, micro_batches: Sequence[Batch], step: int, stop: bool = False) -> StepMetrics:
    """Run optimizer step `step` (0-based) on this process's micro-batches.

    Each sample's loss counts 1 / the step's samples, wherever it is computed, and gradients are summed over
    processes: the update does not depend on how the batch was cut, beyond rounding. A process may have none of a
    short step's samples.

    After a non-finite loss or gradient no weight is touched, and `problem` says what and where.
    """
    losses = learn(learner, micro_batches, step)
    # One small all-reduce for the loss and the stop flag; reading them waits for the device.
    total = torch.stack([torch.stack(losses).sum(), losses[0].new_full((), float(stop))])
    loss, stops = cast(Tensor, learner.accelerator.reduce(total, "sum")).tolist()
    if not math.isfinite(loss):
        learner.optimizer.zero_grad(set_to_none=True)
        said = loss_problem(step, loss, torch.stack(losses).tolist(), [batch.ids for batch in micro_batches])
        return StepMetrics(loss, math.nan, stops > 0, said)
    norm = float(clip(learner))
    if not math.isfinite(norm) and learner.accelerator.scaler is None:
        learner.optimizer.zero_grad(set_to_none=True)
        return StepMetrics(loss, norm, stops > 0, gradient_problem(step, loss, norm))
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    # Of a fused optimizer, which leaves the step out by itself, Accelerate says that the step was taken.
    overflowed = learner.optimizer.step_was_skipped or not math.isfinite(norm)
    return StepMetrics(loss, norm, stops > 0, overflowed=overflowed)


def learn(learner: Learner, micro_batches: Sequence[Batch], step: int) -> list[Tensor]:
    """Each micro-batch's share of the step's mean loss, detached; the parameters have the step's gradient after it."""
    losses = [_backward(learner, batch, step) for batch in micro_batches] or [_backward_nothing(learner)]
    _sum_gradients(learner)
    return losses


def _backward(learner: Learner, batch: Batch, step: int) -> Tensor:
    """Backward of one micro-batch; its share of the step's mean loss, detached."""
    words = [(learner.seed, step, position) for position in batch.positions.tolist()]
    beside = beside_latents(learner.bundle, batch, words)
    batch = on_device(batch, learner.accelerator.device)
    # Adapter dropout is the only draw from the global generator.
    torch.manual_seed(seed_for(learner.seed, "dropout", step, int(batch.positions[0])))
    with torch.no_grad():
        moments = latent_moments(learner.bundle, batch)
    draws = draw(learner.objective, learner.seed, step, batch, moments[0].shape[1:])
    with learner.accelerator.autocast():
        noised = noised_latents(learner.objective, learner.bundle, moments, draws, beside)
        wanted = wanted_prediction(learner.bundle, noised)
        if batch.from_base:
            wanted.index_copy_(0, rows_on(batch.from_base, wanted.device), base_prediction(learner, batch, noised))
        condition = learner.conditions(batch.captions)
        losses = sample_losses(learner.objective, learner.bundle, noised, condition, wanted, batch.masks)
    share = (losses * batch.loss_weights).sum() / batch.step_samples
    learner.accelerator.backward(share)
    return share.detach()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with what the networks and the loss read of it on `device`; what the host reads stays where it is."""
    names = ("pixels", "latent_mean", "latent_std", "masks", "loss_weights")
    found = {name: getattr(batch, name) for name in names}
    return batch._replace(**{name: moved(value, device) for name, value in found.items() if value is not None})


@torch.no_grad()
def base_prediction(learner: Learner, batch: Batch, noised: Noised) -> Tensor:
    """What the base, its adapters off, predicts for the samples of `batch.from_base`: float32 [k, c, h, w]."""
    rows = noised.rows(batch.from_base)
    with without_adapters(learner.bundle.components):
        condition = learner.conditions([batch.captions[row] for row in batch.from_base])
        return learner.bundle.family.predict(learner.bundle, rows.noisy, rows.timesteps, condition, rows.beside).float()


def _backward_nothing(learner: Learner) -> Tensor:
    """Gradients of zero, for a process without a sample: the others' sums, and fp16's scaler, wait for it too."""
    nothing = torch.stack([parameter.sum() for parameter in learner.parameters]).sum() * 0.0
    learner.accelerator.backward(nothing)
    return nothing.detach()


def _sum_gradients(learner: Learner) -> None:
    """Sum gradients over processes in flat buffers; an adapter's mostly fit one, and one all-reduce is cheapest.

    Those of sharded weights were summed in the backward pass.
    """
    if learner.accelerator.num_processes == 1:
        return
    for parameters in _buckets([p for p in learner.parameters if p.requires_grad and not is_sharded(p)]):
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = cast(Tensor, learner.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum"))
        for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in their order, BUCKET elements together or a little more."""
    bucket, count = list[nn.Parameter](), 0
    for parameter in parameters:
        bucket.append(parameter)
        count += parameter.numel()
        if count >= BUCKET:
            yield bucket
            bucket, count = [], 0
    if bucket:
        yield bucket


def clip(learner: Learner) -> Tensor:
    """Clip to max_grad_norm (0: only measure); the norm before clipping.

    `parameters` is a list: an iterator handed to the optimizer and then here would be empty by now.
    """
    limit = learner.max_grad_norm or math.inf
    if any(is_sharded(parameter) for parameter in learner.parameters):
        gradients = [p.grad for p in learner.parameters if p.grad is not None]
        total = whole(torch.nn.utils.get_total_norm(gradients))
        torch.nn.utils.clip_grads_with_norm_(learner.parameters, limit, total)
        return total
    norm = learner.accelerator.clip_grad_norm_(learner.parameters, limit)
    assert norm is not None
    return norm


def loss_problem(step: int, loss: float, parts: Sequence[float], samples: Sequence[Sequence[str]]) -> str:
    """What is said of a step whose loss is not finite: with the samples of the micro-batches whose part is not, if they
    lie on this process."""
    judged = zip(parts, samples, strict=False)  # of a process without a sample there is a loss and no batch
    bad = [name for part, ids in judged if not math.isfinite(part) for name in ids]
    suspects = f" Samples in the failing micro-batches: {', '.join(bad)}." if bad else ""
    return f"The loss of step {step + 1} is {loss}.{suspects}"


def gradient_problem(step: int, loss: float, norm: float) -> str:
    """What is said of a step whose loss is finite, and its gradient is not."""
    return f"The gradient of step {step + 1} has norm {norm} (the loss was {loss:.4g})."
