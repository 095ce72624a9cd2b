"""What is compiled, counted beforehand from the module tree."""

from __future__ import annotations

from typing import Any

import pytest

from lora_kit.models.outline import read_outline
from lora_kit.models.repeated_blocks import compile_plan, repeated_blocks
from lora_kit.recipe import PresetRules, Recipe, TargetRule
from lora_kit.recipe.compiling import batch_lengths
from lora_kit.recipe.sections import ModelSection
from lora_kit.targeting import make_plan


def test_stable_diffusions_blocks(small_real_base):
    """SD 1.5: two resnets a level down, three up, two in the middle; transformers on three of the four levels."""
    tree = read_outline(ModelSection(base=str(small_real_base("sd1")))).tree
    found = compile_plan(tree, make_plan(PresetRules(preset="attention", rank=4), tree), shapes=3)
    assert found.blocks == {"transformer block": 16, "resnet": 22}
    assert found.pieces == 3 * found.different
    levels = {(block.kind, block.level) for block in repeated_blocks(tree)}
    assert levels == {("transformer block", i) for i in range(4)} | {("resnet", i) for i in range(4)}
    # Resnets: by level and inputs, 2 + 2 + 2 + 1 down (the middle's are the last level's), 3 + 3 + 3 + 1 up.
    assert found.different == 4 + sum(len(inputs) for inputs in resnet_inputs(tree).values())


def resnet_inputs(tree: Any) -> dict[int, set[tuple[int, int]]]:
    """Level → the resnets' (inputs, outputs)."""
    found: dict[int, set[tuple[int, int]]] = {}
    for block in repeated_blocks(tree):
        if block.kind == "resnet":
            out, inputs = dict(block.shapes)["conv1"][:2]
            found.setdefault(block.level, set()).add((inputs, out))
    return found


def test_what_some_of_like_blocks_are_given_makes_them_different():
    tree = read_outline(ModelSection(base="tiny")).tree
    rules = ("unet.conv_in", "unet.**.resnets.*.conv1", "unet.mid_block.resnets.0.conv1")
    nothing, all_alike, one = (compile_plan(tree, _plan(tree, match), 1).different for match in rules)
    assert all_alike == nothing
    assert one == nothing + 1  # the middle's other resnet has its shapes


def _plan(tree: Any, match: str) -> Any:
    return make_plan([TargetRule(match=match, rank=2)], tree)


def _recipe(batch: int, micro: int | None, short: str | None = None) -> Recipe:
    data: dict[str, Any] = {"sources": [{"path": "pictures"}], "resolution": 64, "batch_size": batch}
    if short:
        data["buckets"] = {"short": short}
    return Recipe.model_validate({"data": data, "train": {"micro_batch_size": micro}})


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "lengths"),
    [(4, None, 1, 1), (4, 2, 1, 1), (5, 2, 1, 2), (6, 4, 1, 1), (5, None, 2, 2), (7, 2, 2, 2)],
)
def test_lengths_of_micro_batches(batch, micro, processes, lengths):
    assert batch_lengths(_recipe(batch, micro), processes) == lengths


def test_short_batches_may_have_any_length():
    assert batch_lengths(_recipe(8, 4, "short")) == 4
    assert batch_lengths(_recipe(8, 4, "wrap")) == 1
