"""What `train.compile` will compile, for a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_kit.models.repeated_blocks import CompilePlan, compile_plan
from lora_kit.recipe.compiling import batch_lengths

if TYPE_CHECKING:
    from lora_kit.cli.plan_sources import DataFacts
    from lora_kit.recipe import Recipe
    from lora_kit.targeting import ModuleInfo, TargetPlan


def compiled(recipe: Recipe, tree: Sequence[ModuleInfo], plan: TargetPlan, data: DataFacts) -> CompilePlan | None:
    """None where the recipe compiles nothing. For one process."""
    if not recipe.train.compile:
        return None
    squares = {source.resolution or recipe.data.resolution for source in recipe.data.sources}
    sizes = len(data.buckets.buckets) if data.buckets else len(squares)
    return compile_plan(tree, plan, sizes * batch_lengths(recipe))


def compile_json(found: CompilePlan | None) -> dict[str, Any] | None:
    """As the document of `lora-kit plan --json` holds it."""
    return None if found is None else {**found._asdict(), "pieces": found.pieces}
