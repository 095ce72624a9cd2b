"""`lora-kit plan --probe`: what a few steps took, and what that makes of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kit.allocator import keep_freed_blocks
from lora_kit.cli.quick_imports import quick_imports, uses_bitsandbytes
from lora_kit.cli.text import byte_size

if TYPE_CHECKING:
    from lora_kit.cli.plan_facts import Memory
    from lora_kit.recipe import Recipe
    from lora_kit.training.probe import Probe


def probed(recipe: Recipe) -> Probe:
    """Run the steps."""
    keep_freed_blocks()
    with quick_imports(compiles=uses_bitsandbytes(recipe)):
        from lora_kit.training.probe import probe  # here: a plan without it needs no torch

    return probe(recipe)


def probe_lines(found: Probe, recipe: Recipe, reckoned: Memory) -> list[str]:
    """The steps' time, the run's, and the memory beside what was reckoned."""
    each = ", ".join(f"{one:.3g}" for one in found.seconds)
    whole = found.seconds_a_step * recipe.train.max_steps
    parts = f" in {found.micro_batches} micro-batches" if found.micro_batches > 1 else ""
    lines = [
        f"probe: {len(found.seconds)} steps of {found.batch_size} pictures of {found.side} x {found.side}{parts} on "
        f"{found.device}: {found.seconds_a_step:.3g} s a step (one by one: {each}), {found.pictures_a_second:.3g} "
        "pictures a second",
        f"       {recipe.train.max_steps:,} steps take {duration(whole)}, without start, encoding, validation and "
        "checkpoints",
    ]
    lines += [f"       {notice}" for notice in found.notices]
    if found.peak_bytes is None:
        return [*lines, "       memory: this system does not tell"]
    said = f"; reckoned {byte_size(reckoned.expected_peak)}" if reckoned.expected_peak is not None else ""
    lines.append(f"       memory: at most {byte_size(found.peak_bytes)} in the steps{said}")
    if found.loading_bytes is not None:
        lines[-1] += f"; at most {byte_size(found.loading_bytes)} while loading"
    return lines


def duration(seconds: float) -> str:
    """`3 h 20 min`, `5 min 10 s`, `42 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
