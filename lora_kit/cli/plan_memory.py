"""The plan's memory: what stays, what a step adds to it, and the peak that comes of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_kit.cli.quick_imports import quick_imports, uses_bitsandbytes
from lora_kit.cli.text import byte_size

if TYPE_CHECKING:
    from lora_kit.cli.plan_facts import Memory
    from lora_kit.recipe import Recipe
    from lora_kit.targeting import TargetPlan
    from lora_kit.targeting.quantised import Quantised


def with_step(held: Memory, recipe: Recipe, plan: TargetPlan, few_bits: Quantised) -> Memory:
    """The memory with what a step adds, reckoned by a pass on fake tensors.

    That takes the run's own libraries, and longer than the rest of a plan: their bytes are measured here, too.
    """
    with quick_imports(compiles=uses_bitsandbytes(recipe)):
        from lora_kit.training.reckoning.fake_step import reckon

    import torch

    from lora_kit.training.reckoning.libraries import libraries_bytes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    libraries = libraries_bytes() if device == "cpu" else 0
    found = reckon(recipe, plan, few_bits, device)
    # At the end of the forward pass all that is saved lives; gradients come as it goes.
    activations = max(found.peak - found.gradients, found.saved)
    return held._replace(saved=found.saved, activations=activations, libraries=libraries, device=device)


def memory_json(held: Memory) -> dict[str, Any]:
    """As the document of `lora-kit plan --json` holds it."""
    return held._asdict() | {"trainable": held.trainable, "expected_peak": held.expected_peak}


def memory_lines(held: Memory, recipe: Recipe) -> list[str]:
    """A line for each part, and their sum."""
    average = f", average {byte_size(held.average)}" if held.average else ""
    weights, gradients, moments = map(byte_size, (held.weights, held.gradients, held.moments))
    parts = f"weights {weights}, gradients {gradients}, moments {moments}{average}"
    few = f" (of {byte_size(held.unquantised)} before `model.quantize`)" if held.unquantised is not None else ""
    lines = [
        f"memory: {byte_size(held.trainable)} to train ({parts})",
        f"        {byte_size(held.frozen)} frozen weights{few}",
    ]
    if held.activations is None or held.libraries is None or held.expected_peak is None or held.saved is None:
        return [*lines, "        activations come on top: --memory reckons them"]
    from lora_kit.training.reckoning.fake_step import micro_batch, picture_side

    side, count = picture_side(recipe), micro_batch(recipe)
    pictures = f"{count} picture{'s' if count > 1 else ''} of {side} x {side}"
    lines.append(
        f"        {byte_size(held.activations)} activations of {pictures}, of which the backward pass keeps "
        f"{byte_size(held.saved)}"
    )
    if held.device == "cpu":
        lines.append(f"        {byte_size(held.libraries)} interpreter and libraries, as measured here")
    kind = "resident on the CPU" if held.device == "cpu" else "allocated on the GPU"
    return [*lines, f"        {byte_size(held.expected_peak)} expected at a step's peak, {kind}"]
