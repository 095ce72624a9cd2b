"""The plan's memory: what stays, what each stage adds to it, and the peaks that come of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_kit.cli.quick_imports import import_environment, quick_imports, uses_bitsandbytes
from lora_kit.cli.text import byte_size

if TYPE_CHECKING:
    from lora_kit.cli.plan_facts import Memory
    from lora_kit.recipe import Recipe
    from lora_kit.targeting import TargetPlan
    from lora_kit.targeting.quantised import Quantised


def with_step(held: Memory, recipe: Recipe, plan: TargetPlan, few_bits: Quantised, samples: int) -> Memory:
    """The memory with what each stage adds, reckoned by passes on fake tensors. samples: pictures in an epoch.

    That takes the run's own libraries, and longer than the rest of a plan. What they take themselves is measured in the
    meantime, in a process of its own.
    """
    from lora_kit.training.reckoning.libraries import measuring_libraries

    with measuring_libraries(recipe, plan, import_environment(recipe)) as libraries:
        with quick_imports(compiles=uses_bitsandbytes(recipe)):
            from lora_kit.training.reckoning.fake_step import reckon

        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = reckon(recipe, plan, few_bits, device, samples)
        own = libraries() if device == "cpu" else None
        return held._replace(
            saved=found.saved,
            # At the end of the forward pass all that is saved lives; gradients come as it goes.
            activations=max(found.peak - found.gradients, found.saved),
            encoding=found.encoding,
            measuring=found.measuring,
            drawing=found.drawing,
            rested=found.rested,
            kept=found.kept if device == "cpu" else 0,
            waiting=found.waiting,
            libraries=own.all if own is not None else 0,
            kernels=own.steps if own is not None else 0,
            device=device,
        )


def memory_json(held: Memory) -> dict[str, Any]:
    """As the document of `lora-kit plan --json` holds it."""
    own = {"trainable": held.trainable, "expected_peak": held.expected_peak, "expected_peaks": held.expected_peaks}
    return held._asdict() | own


def memory_lines(held: Memory, recipe: Recipe) -> list[str]:
    """A line for each part, and their sums."""
    average = f", average {byte_size(held.average)}" if held.average else ""
    weights, gradients, moments = map(byte_size, (held.weights, held.gradients, held.moments))
    parts = f"weights {weights}, gradients {gradients}, moments {moments}{average}"
    few = f" (of {byte_size(held.unquantised)} before `model.quantize`)" if held.unquantised is not None else ""
    rested = f", of which {byte_size(held.rested)} are given back after encoding" if held.rested else ""
    lines = [
        f"memory: {byte_size(held.trainable)} to train ({parts})",
        f"        {byte_size(held.frozen)} frozen weights{few}{rested}",
    ]
    if held.activations is None or held.libraries is None or held.expected_peak is None or held.saved is None:
        return [*lines, "        activations come on top: --memory reckons them"]
    from lora_kit.training.sizes import micro_batch, picture_side

    side, count = picture_side(recipe), micro_batch(recipe)
    pictures = f"{count} picture{'s' if count > 1 else ''} of {side} x {side}"
    lines.append(
        f"        {byte_size(held.activations)} activations of {pictures}, of which the backward pass keeps "
        f"{byte_size(held.saved)}"
    )
    if held.device == "cpu":
        lines.append(f"        {byte_size(held.libraries)} interpreter and libraries, as measured here")
    if held.kept:
        lines.append(f"        {byte_size(held.kept)} latents and captions' states, kept in memory")
    kind = "resident on the CPU" if held.device == "cpu" else "allocated on the GPU"
    peaks = {stage: size for stage, size in held.expected_peaks.items() if stage != "steps"}
    others = ", ".join(f"{byte_size(size)} in its {stage}" for stage, size in peaks.items())
    return [*lines, f"        {byte_size(held.expected_peak)} expected at a step's peak, {kind}; {others}"]
