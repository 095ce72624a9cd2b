"""What a quantised base cannot be combined with, told when the recipe is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_kit.recipe.base import Problem

if TYPE_CHECKING:
    from lora_kit.recipe.checks import Placed
    from lora_kit.recipe.sections import ModelSection

_OVER_QUANTISED = ("lora", "rslora")


def quantize_problems(model: ModelSection, trained: list[Placed]) -> Iterator[Problem]:
    """Everything wrong between `model.quantize` and the rules that train something."""
    if model.quantize == "none":
        return
    said = f"`model.quantize: {model.quantize}`"
    if model.weights == "fresh":
        yield Problem(("model", "weights"), f"`fresh` weights are untrained, and {said} freezes them; remove one.")
    for path, rule in trained:
        if rule.method == "full":
            why = "saves a whole model of trained weights, which a quantised base has not; train an adapter"
            yield Problem((*path, "method"), f"`full` {why}, or set `model.quantize: none` (got {said}).")
        elif rule.method not in (*_OVER_QUANTISED, "diff") and getattr(rule, "kind", "any") != "conv":
            why = f"computes with the weights themselves, and {said} holds linear layers' in few bits"
            fix = "use `lora` or `rslora`, pick convolutions only (`kind: conv`), or set `model.quantize: none`."
            yield Problem((*path, "method"), f"`{rule.method}` {why}; {fix}")
        if rule.init == "pissa" and getattr(rule, "kind", "any") != "conv":
            why = f"takes its directions out of the exact weights, and {said} rounds what is left"
            yield Problem((*path, "init"), f"`pissa` {why}; use another init, or `kind: conv`.")
