"""`inpainting:` in a recipe: what goes together, what is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_kit.errors import RecipeError
from lora_kit.recipe import Recipe, dump_recipe, load_recipe, recipe_schema
from lora_kit.recipe.inpainting import InpaintingSection, check_inpainting

MASKED = "{path: ., mask_suffix: -mask}"


def load(folder: Path, *overrides: str, source: str = "{path: .}") -> Recipe:
    path = folder / "r.yaml"
    path.write_text(f"data: {{sources: [{source}]}}\noutput_dir: /runs/x\n")
    return load_recipe(path, overrides)


def test_without_the_section_nothing_is_said(tmp_path: Path) -> None:
    assert load(tmp_path).inpainting is None


def test_the_defaults_are_stable_diffusions_training(tmp_path: Path) -> None:
    section = load(tmp_path, "inpainting={}").inpainting
    assert section == InpaintingSection()
    assert section is not None and section.whole == 0.25


@pytest.mark.parametrize(
    ("overrides", "source", "said"),
    [
        (["inpainting.whole=1.5"], "{path: .}", "inpainting.whole: got 1.5; must be at most 1."),
        (["inpainting.smallest=0.7"], "{path: .}", "inpainting.smallest: got 0.7, which is above `largest` = 0.6"),
        (["inpainting.shapes={rectangles: 0, strokes: 0}"], "{path: .}", "inpainting.shapes: needs one that is above"),
        (["inpainting={whole: 1, most: 2}"], "{path: .}", "inpainting.most: `most: 2` does nothing with `whole: 1`"),
        (
            ["inpainting={stroke_width: 0.1, shapes: {strokes: 0}}"],
            "{path: .}",
            "inpainting.stroke_width: `stroke_width: 0.1` does nothing with `shapes.strokes: 0`",
        ),
        (
            ["inpainting.shown=2"],
            "{path: .}",
            "inpainting.shown: `shown: 2` does nothing without `validation.held_out`",
        ),
        (["inpainting.rectangle=1"], "{path: .}", "inpainting.rectangle"),
        (["inpainting.masks=data"], "{path: .}", "inpainting.masks: `data` needs mask files: give a source a `mask_f"),
        (
            ["inpainting.masks=data", "objective.unmasked_weight=0.1"],
            MASKED,
            "objective.unmasked_weight: does nothing with `inpainting.masks: data`",
        ),
        (
            ["inpainting.masks=data", "data.alpha=mask"],
            MASKED,
            "inpainting.masks: `data` beside `alpha: mask`: the one says what is filled",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, overrides: list[str], source: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, *overrides, source=source)
    assert any(said in line for line in str(caught.value).splitlines()), str(caught.value)


def test_it_is_refused_for_a_base_that_sees_no_mask(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"inpainting: is about bases .* tiny is sd1, whose UNet sees no mask"):
        check_inpainting(load(tmp_path, "inpainting={}"), "sd1", fills=False)
    check_inpainting(load(tmp_path), "sd1", fills=False)


@pytest.mark.parametrize(
    ("overrides", "source"),
    [
        ([], MASKED),
        (["inpainting.whole=0.5"], MASKED),
        (["data.alpha=mask"], "{path: .}"),
        (["validation.held_out={path: other, mask_folder: masks}"], "{path: .}"),
    ],
)
def test_a_mask_files_meaning_has_to_be_said(tmp_path: Path, overrides: list[str], source: str) -> None:
    recipe = load(tmp_path, *overrides, source=source)
    with pytest.raises(RecipeError, match=r"inpainting\.masks: tiny is sd1-inpainting, .* and the data has masks"):
        check_inpainting(recipe, "sd1-inpainting", fills=True)
    said = load(tmp_path, *overrides, "inpainting.masks=drawn", source=source)
    check_inpainting(said, "sd1-inpainting", fills=True)


def test_the_section_survives_writing_and_is_told_by_the_schema(tmp_path: Path) -> None:
    recipe = load(tmp_path, "inpainting={whole: 0.5, shapes: {strokes: 0}}")
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    keys = recipe_schema()["$defs"]["InpaintingSection"]["properties"]
    assert all(key.get("description") or "$ref" in key for key in keys.values())
