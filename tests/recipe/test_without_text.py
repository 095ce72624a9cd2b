"""What a recipe may not ask of a super-resolution base, and how captions stop to matter."""

from __future__ import annotations

from typing import Any

import pytest

from lora_kit.errors import RecipeError
from lora_kit.recipe import Recipe, SourceSection
from lora_kit.recipe.without_text import check_super_resolution, fitted_to_base

SOURCES = [{"path": "pictures"}]


def recipe(**sections: Any) -> Recipe:
    data = {"sources": SOURCES, "resolution": 64} | sections.pop("data", {})
    return Recipe.model_validate({"data": data, **sections})


def refused(**sections: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        check_super_resolution(recipe(**sections), side_step=32)
    return str(caught.value).splitlines()[1:]


def test_a_plain_recipe_fits() -> None:
    check_super_resolution(recipe(), side_step=32)
    check_super_resolution(recipe(data={"buckets": {"step": 32}}, degradation={"jpeg": [60, 90]}), side_step=32)


def test_everything_wrong_is_told_at_once() -> None:
    told = refused(
        data={"trigger": "sks", "resolution": 48},
        validation={"prompts": ["a cat"], "negative_prompt": "blurry", "guidance": 3, "drift_prompts": ["a dog"]},
        model={"tokenizer": "somewhere"},
        tokens=[{"token": "<sks>", "initializer": "cat"}],
    )
    assert [line.split(":")[0].strip() for line in told] == [
        "data.trigger",
        "validation.prompts",
        "validation.negative_prompt",
        "validation.guidance",
        "model.tokenizer",
        "tokens",
        "validation.drift_prompts",
        "data.resolution",
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"resolution": 48}, "data.resolution: got 48; this base takes sides that are multiples of 32: 32, for"),
        ({"resolution": 8}, "data.resolution: got 8; this base takes sides that are multiples of 32: 32, for"),
        (
            {"sources": [*SOURCES, {"path": "b", "resolution": 72}], "buckets": {"step": 8}},
            "data.sources.1.resolution: got 72; this base takes sides that are multiples of 32: 64, for",
        ),
        ({"buckets": {"step": 16}}, "data.buckets.step: got 16; this base takes sides that are multiples of 32"),
    ],
)
def test_sides_that_the_network_cannot_halve_are_refused(data: dict[str, Any], said: str) -> None:
    assert any(line.strip().startswith(said) for line in refused(data=data))


def test_pictures_too_small_to_be_scored_are_refused() -> None:
    small = recipe(data={"resolution": 8}, validation={"held_out": 0.5})
    with pytest.raises(RecipeError, match=r"validation.restored: held-out pictures have 8 pixels a side"):
        check_super_resolution(small, side_step=8)
    check_super_resolution(recipe(data={"resolution": 8}, validation={"held_out": 0.5, "restored": 0}), side_step=8)


def test_captions_stop_to_matter_for_all_sources() -> None:
    given = recipe(validation={"held_out": {"path": "others"}})
    fitted = fitted_to_base(given, side_step=32)
    held_out = fitted.validation.source
    assert held_out is not None
    assert not any(source.reads_captions for source in (*fitted.data.sources, held_out))
    assert SourceSection(path="pictures").reads_captions
    assert fitted_to_base(given, side_step=0) is given


def test_degradation_is_for_super_resolution_alone() -> None:
    with pytest.raises(RecipeError, match="degradation: is about super-resolution's low-resolution pictures"):
        fitted_to_base(recipe(degradation={"noise": [1, 2]}), side_step=0)
