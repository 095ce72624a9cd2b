"""The `inpainting:` section: which parts of a picture an inpainting model learns to fill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from lora_kit.errors import RecipeError
from lora_kit.recipe.base import AtLeast0, Fraction, NonNegative, Positive, Problem, Section, idle, refuse

if TYPE_CHECKING:
    from lora_kit.recipe.sections import Recipe
    from lora_kit.recipe.sources import SourceSection

Share = Annotated[float, Field(gt=0, le=1)]
_MASK_KEYS = ("mask_folder", "mask_suffix", "mask_column")


class ShapeSection(Section):
    """How often drawn masks are made of what, in proportion to each other; 0: never."""

    rectangles: AtLeast0 = 1.0
    """Upright rectangles."""
    strokes: AtLeast0 = 1.0
    """Thick round strokes that change their direction, as of a brush."""

    @model_validator(mode="after")
    def _some(self) -> ShapeSection:
        if not self.rectangles + self.strokes:
            refuse("ShapeSection", [Problem((), "needs one that is above 0.")])
        return self


class InpaintingSection(Section):
    """Which parts of a picture are to be filled, for a base that is given mask and masked picture."""

    masks: Literal["drawn", "data"] | None = None
    """`drawn`: masks are drawn at random, new ones in each step, and mask files, where there are any, weigh the loss as
    everywhere else (white counts). `data`: the sources' mask files say what is to be filled (white, from 50 %, is
    filled), all of the picture counts in the loss, and pictures without one get drawn masks. Default: `drawn`; with
    mask files it has to be written."""
    whole: Fraction = 0.25
    """Probability that all of a picture is masked, whatever its mask would be: the model keeps drawing from the prompt
    alone. 0.25 is what Stable Diffusion's inpainting models were trained with."""
    shapes: ShapeSection = ShapeSection()
    """What drawn masks are made of: each of one kind."""
    most: Positive = 4
    """A drawn mask has 1 to so many rectangles, or a stroke 1 to so many pieces, each number as often."""
    smallest: Share = 0.1
    """Least side of a rectangle as a part of the picture's side, and length of a stroke's piece as a part of the
    picture's shorter one. From here to `largest` all are as likely."""
    largest: Share = 0.6
    """The longest."""
    stroke_width: Share = 0.2
    """Greatest width of a stroke as a part of the picture's shorter side; the least is a quarter of it."""
    shown: NonNegative = 8
    """Held-out pictures that are filled at each validation (samples/filled-….png), each with a mask that stays the
    same and never covers all of it. Prompts of `validation.prompts` are drawn with everything masked."""

    @model_validator(mode="after")
    def _agrees(self) -> InpaintingSection:
        refuse("InpaintingSection", _own_problems(self))
        return self


def inpainting_problems(recipe: Recipe) -> Iterator[Problem]:
    """What of `inpainting` does not fit the recipe's other sections, whatever the base is."""
    section = recipe.inpainting
    if section is None:
        return
    if recipe.validation.held_out is None:
        for path, message in idle(section, ("shown",), "does nothing without `validation.held_out`; remove it."):
            yield Problem(("inpainting", *path), message)
    if section.masks != "data":
        return
    place = ("inpainting", "masks")
    if not any(_has_mask_files(source) for source in recipe.data.sources):
        said = "`data` needs mask files: give a source a `mask_folder`, `mask_suffix` or `mask_column`; or use `drawn`."
        yield Problem(place, said)
    if _transparent(recipe):
        said = "`data` beside `alpha: mask`: the one says what is filled, the other what counts in the loss; keep one."
        yield Problem(place, said)
    if recipe.objective.unmasked_weight:
        said = "does nothing with `inpainting.masks: data`, where all of a picture counts; remove it."
        yield Problem(("objective", "unmasked_weight"), said)


def check_inpainting(recipe: Recipe, family: str, fills: bool) -> None:
    """Raise RecipeError where the recipe does not say what a base of this family needs to be told, or says what does
    nothing for it. fills: the base is given mask and masked picture."""
    section, base = recipe.inpainting, recipe.model.base
    if not fills and section is not None:
        raise RecipeError(
            f"inpainting: is about bases that are given a mask (their UNet takes 9 channels), and {base} is {family}, "
            "whose UNet sees no mask. Remove the section, or name an inpainting base."
        )
    if fills and (section is None or section.masks is None) and _has_masks(recipe):
        raise RecipeError(
            f"inpainting.masks: {base} is {family}, which fills masks, and the data has masks. Say what they are: "
            "`data` (white is filled) or `drawn` (white counts in the loss, and what is filled is drawn at random)."
        )


def _own_problems(section: InpaintingSection) -> Iterator[Problem]:
    if section.smallest > section.largest:
        said = f"got {section.smallest:g}, which is above `largest` = {section.largest:g}; make it at most that."
        yield Problem(("smallest",), said)
    if section.whole == 1:
        why = "does nothing with `whole: 1`, which masks everything; remove it, or make `whole` less."
        shape = ("shapes", "most", "smallest", "largest", "stroke_width")
        yield from idle(section, (*shape, "masks") if section.masks == "data" else shape, why)
    elif not section.shapes.strokes:
        why = "does nothing with `shapes.strokes: 0`; remove it."
        yield from idle(section, ("stroke_width",), why)


def _has_masks(recipe: Recipe) -> bool:
    return any(_has_mask_files(source) for source in _sources(recipe)) or _transparent(recipe)


def _transparent(recipe: Recipe) -> bool:
    return "mask" in (recipe.data.alpha, *(source.alpha for source in _sources(recipe)))


def _has_mask_files(source: SourceSection) -> bool:
    return any(getattr(source, key) is not None for key in _MASK_KEYS)


def _sources(recipe: Recipe) -> Sequence[SourceSection]:
    held_out = recipe.validation.source
    return [*recipe.data.sources, *([held_out] if held_out else [])]
