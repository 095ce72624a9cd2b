"""What a plan costs: steps and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from lora_kit.recipe import Recipe
from lora_kit.recipe.optimizer import OPTIMIZERS
from lora_kit.targeting import Target, TargetPlan
from lora_kit.targeting.quantised import Quantised

FP32 = 4
_BLOCK = 256  # bitsandbytes keeps an fp32 scale for this many 8-bit moments
_SMALLEST_8BIT = 4096  # elements; it keeps smaller tensors' moments in fp32


class Memory(NamedTuple):
    """Bytes of what stays in memory through a run, and of what a step adds."""

    weights: int
    """Trainable, fp32."""
    gradients: int
    moments: int
    """What the optimizer keeps of each weight: its moments, and Prodigy's or the schedule-free ones' copies. Of a
    `package.Class` as much as of AdamW, for want of knowing."""
    average: int
    """The moving average of `train.ema_decay`."""
    frozen: int
    """Frozen UNet and text encoder in the base's precision, and the VAE in fp32."""

    unquantised: int | None = None
    """What `frozen` would be without `model.quantize`; None: it is not quantised."""
    activations: int | None = None
    """What the fullest moment of a micro-batch's passes holds beyond weights and all gradients, and at least what is
    saved: it grows with batch and resolution. None, as the rest: not reckoned."""
    saved: int | None = None
    """Of these, what autograd keeps from the forward pass for the backward pass."""
    libraries: int | None = None
    """Interpreter and libraries on a CPU; 0 on a GPU, where only tensors count."""
    kernels: int = 0
    """Of these, what comes with the first step: kernels' code."""
    encoding: int | None = None
    """What encoding pictures adds at the start; 0 where nothing is kept of them."""
    measuring: int = 0
    """What measuring held-out pictures adds; 0 without any."""
    drawing: int = 0
    """What drawing at validations adds; 0 without any."""
    rested: int | None = None
    """Of the frozen weights, those of encoders that are given back once all they make is kept."""
    kept: int = 0
    """Latents and captions' states in memory."""
    waiting: int = 0
    """Of the frozen weights, those that are in their file alone while pictures are encoded."""
    device: str | None = None
    """What a run would take here: `cpu` or `cuda`."""

    @property
    def expected_peak(self) -> int | None:
        """The most that a step holds: resident on a CPU, allocated on a GPU."""
        return self.expected_peaks.get("steps")

    @property
    def expected_peaks(self) -> dict[str, int]:
        """The most that each stage holds, by the names that a run's closing line has; empty: not reckoned."""
        if self.activations is None or self.libraries is None:
            return {}
        base = self.libraries + self.kept
        held = base + self.frozen + self.weights
        kept = held + self.moments + self.average
        found = {
            "start": max(self._loading(base), held + self.measuring) - self.kernels,
            "steps": kept - (self.rested or 0) + self.gradients + self.activations,
        }
        most = max(self.measuring, self.drawing)
        return found | ({"validation": kept + most} if most else {})

    def _loading(self, base: int) -> int:
        """The most while the base is loaded, and then while pictures are encoded. On a GPU the encoders alone are there
        by then."""
        encoding = self.encoding or 0
        if self.device == "cuda":
            return (self.rested or 0) + encoding
        whole = base + (self.frozen if self.unquantised is None else self.unquantised)
        return max(whole + self.weights, whole - self.waiting + encoding)

    @property
    def trainable(self) -> int:
        """All that grows with the trainable weights."""
        return self.weights + self.gradients + self.moments + self.average


class Steps(NamedTuple):
    """The run's length."""

    max_steps: int
    batch_size: int
    micro_batch_size: int | None
    """None: the batch size over the processes of the launch."""
    samples_per_epoch: int | None
    """None if a source is on the hub, as counting would download it. Without those that a bucket shows once more."""
    epochs: float | None


def memory(recipe: Recipe, plan: TargetPlan, parameters: dict[str, int], few_bits: Quantised | None = None) -> Memory:
    """Estimate from counts alone; `parameters` of each network, the VAE too."""
    trainable = plan.trainable_parameters * FP32
    whole = sum(target.parameters for target in plan.targets if target.method == "full")
    # Where whole weights train, all of the base is held in fp32.
    width = FP32 if whole or recipe.train.mixed_precision == "no" else 2
    vae = parameters.get("vae", 0)
    frozen = (sum(parameters.values()) - vae - whole) * width + vae * FP32
    saved = few_bits.before(width) - few_bits.after if few_bits and few_bits.modules else None
    return Memory(
        weights=trainable,
        gradients=trainable,
        moments=sum(_moments(recipe.optimizer.name, size) for target in plan.targets for size in _tensors(target)),
        average=trainable if recipe.train.ema_decay else 0,
        frozen=frozen - (saved or 0),
        unquantised=frozen if saved is not None else None,
    )


def steps(recipe: Recipe, samples: int | None, steps_per_epoch: int | None = None) -> Steps:
    """Length of the run. samples: in an epoch, None if not known; steps_per_epoch: where buckets' last batches make
    them more than samples over batch size."""
    seen = recipe.train.max_steps * recipe.data.batch_size
    epochs = seen / samples if samples else None
    return Steps(
        recipe.train.max_steps,
        recipe.data.batch_size,
        recipe.train.micro_batch_size,
        samples,
        recipe.train.max_steps / steps_per_epoch if steps_per_epoch else epochs,
    )


def _tensors(target: Target) -> Iterator[int]:
    """Elements of each tensor that trains."""
    for shape in target.shapes.values():
        yield math.prod(shape)


def _moments(optimizer: str, elements: int) -> int:
    known = OPTIMIZERS.get(optimizer, OPTIMIZERS["adamw"])
    if not optimizer.endswith("8bit"):
        return int(known.state_bytes * elements)
    moments = int(known.state_bytes)  # a byte of each
    if elements >= _SMALLEST_8BIT:
        return moments * (elements + math.ceil(elements / _BLOCK) * FP32)
    return moments * elements * FP32
