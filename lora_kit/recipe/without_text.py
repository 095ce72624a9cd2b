"""What a recipe may not ask of a model without text, and of a super-resolution model; known once the base is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_kit.errors import RecipeError
from lora_kit.recipe.base import Problem, Section, idle

if TYPE_CHECKING:
    from lora_kit.recipe.sections import DataSection, Recipe

SSIM_WINDOW = 11
"""Pixels along a side of what `training.likeness.ssim` looks at."""
_NO_TEXT = "is about text, and this base reads none; remove it."
_VALIDATION = ("prompts", "negative_prompt", "guidance", "retrieval")


def check_super_resolution(recipe: Recipe, side_step: int) -> None:
    """Raise one RecipeError for everything that a super-resolution base cannot do. side_step: what the training
    pictures' sides must be multiples of."""
    problems = [*_text_problems(recipe), *_size_problems(recipe.data, side_step), *_score_problems(recipe)]
    _refuse(recipe, problems)


def check_with_text(recipe: Recipe) -> None:
    """Raise RecipeError for what only super-resolution takes."""
    if recipe.degradation is not None:
        said = "is about super-resolution's low-resolution pictures, and this base takes none; remove it."
        _refuse(recipe, [Problem(("degradation",), said)])


def fitted_to_base(recipe: Recipe, side_step: int) -> Recipe:
    """The recipe as its base takes it; side_step: as `check_super_resolution`'s, 0 for any other base.

    Raises RecipeError as the two checks do.
    """
    if not side_step:
        check_with_text(recipe)
        return recipe
    check_super_resolution(recipe, side_step)
    return without_captions(recipe)


def without_captions(recipe: Recipe) -> Recipe:
    """The recipe for a base that reads no text: in all of its sources a picture without a caption is as good as any."""
    sources = [source.without_captions() for source in recipe.data.sources]
    changed: dict[str, Section] = {"data": recipe.data.model_copy(update={"sources": sources})}
    if recipe.validation.source is not None:
        held_out = recipe.validation.source.without_captions()
        changed["validation"] = recipe.validation.model_copy(update={"held_out": held_out})
    return recipe.model_copy(update=changed)


def _refuse(recipe: Recipe, problems: list[Problem]) -> None:
    if problems:
        head = f"The recipe does not fit {recipe.model.base}:"
        lines = [f"  {'.'.join(map(str, path))}: {message}" for path, message in problems]
        raise RecipeError("\n".join([head, *lines]))


def _text_problems(recipe: Recipe) -> Iterator[Problem]:
    data, validation = recipe.data, recipe.validation
    for name, section, keys in (
        ("data", data, ("trigger", "caption_dropout", "captions")),
        ("validation", validation, _VALIDATION),
        ("model", recipe.model, ("tokenizer",)),
        ("optimizer", recipe.optimizer, ("text_encoder_lr",)),
    ):
        for problem in idle(section, keys, _NO_TEXT):
            yield Problem((name, *problem.path), problem.message)
    if recipe.tokens:
        yield Problem(("tokens",), _NO_TEXT)
    if validation.drift_prompts:
        yield Problem(("validation", "drift_prompts"), _NO_TEXT)
    for index, source in enumerate(data.sources):
        if source.captions is not None:
            yield Problem(("data", "sources", index, "captions"), _NO_TEXT)


def _score_problems(recipe: Recipe) -> Iterator[Problem]:
    section, side = recipe.validation, recipe.data.resolution
    side = section.source.resolution or side if section.source is not None else side
    if section.held_out is not None and section.restored and side < SSIM_WINDOW:
        said = f"held-out pictures have {side} pixels a side, and SSIM looks at {SSIM_WINDOW} at once; set it to 0."
        yield Problem(("validation", "restored"), said)


def _size_problems(data: DataSection, step: int) -> Iterator[Problem]:
    sides: list[tuple[tuple[str | int, ...], int]] = [(("data", "resolution"), data.resolution)]
    for index, source in enumerate(data.sources):
        if source.resolution is not None:
            sides.append((("data", "sources", index, "resolution"), source.resolution))
    for place, side in sides:
        if side % step:
            said = f"got {side}; this base takes sides that are multiples of {step}"
            yield Problem(place, f"{said}: {max(step, side // step * step)}, for example.")
    if data.buckets is not None and data.buckets.step % step:
        said = f"got {data.buckets.step}; this base takes sides that are multiples of {step}: write {step}."
        yield Problem(("data", "buckets", "step"), said)
