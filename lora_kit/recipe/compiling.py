"""What compiled blocks cannot be combined with, told when the recipe is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_kit.recipe.base import Problem

if TYPE_CHECKING:
    from lora_kit.recipe.checks import Placed
    from lora_kit.recipe.sections import Recipe


def batch_lengths(recipe: Recipe, processes: int = 1) -> int:
    """How many numbers of pictures there may be in one micro-batch or another of the run, at most."""
    batch = recipe.data.batch_size
    most = min(recipe.train.micro_batch_size or batch, batch)
    if recipe.data.buckets is not None and recipe.data.buckets.short == "short":
        return most
    lengths = set[int]()
    for share in {batch // processes, -(-batch // processes)}:  # processes' shares differ by one
        parts = -(-share // most)
        lengths |= {share // parts, -(-share // parts)}
    return len(lengths)


def compile_problems(recipe: Recipe, trained: list[Placed]) -> Iterator[Problem]:
    """Everything wrong between `train.compile` and the rest. trained: the rules that train something."""
    if not recipe.train.compile:
        return
    said, otherwise = "`train.compile: true`", "or set `train.compile: false`."
    if recipe.model.quantize != "none":
        why = f"holds layers that compiled blocks do not take in (got {said}); set `none`, {otherwise}"
        yield Problem(("model", "quantize"), f"`{recipe.model.quantize}` {why}")
    if recipe.model.attention == "xformers":
        why = f"would stand between the compiled parts (got {said}); set `sdpa`, which is compiled too, {otherwise}"
        yield Problem(("model", "attention"), f"`xformers` {why}")
    if recipe.data.captions.long == "chunks":
        why = f"makes text of changing length, and each length would be compiled anew (got {said}); set `cut`,"
        yield Problem(("data", "captions", "long"), f"`chunks` {why} {otherwise}")
    for path, rule in trained:
        if rule.module_dropout:
            why = f"decides in every pass whether a module takes part, which compiled code cannot (got {said});"
            fix = f"use `dropout` or `rank_dropout`, {otherwise}"
            yield Problem((*path, "module_dropout"), f"got {rule.module_dropout}, which {why} {fix}")
