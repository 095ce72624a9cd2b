"""Which layouts an adapter of a family can be written in. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection

from lora_kit.errors import RecipeError
from lora_kit.models.family.family_names import PIPELINE_FAMILIES
from lora_kit.recipe import SaveSection
from lora_kit.recipe.save import Layout, layout_problem

WITHOUT_KOHYA = frozenset(PIPELINE_FAMILIES.values())
"""The original latent-diffusion models. sd-scripts and LyCORIS, whose names kohya's layout has, load neither."""


def kohya_problem(family: str | None) -> str | None:
    """Why a family's adapter has no kohya file; None if it has, or the family is not known."""
    if family not in WITHOUT_KOHYA:
        return None
    return (
        f"kohya's layout has no names for {family}: it is sd-scripts' own, which knows Stable Diffusion's networks "
        "alone. Write `diffusers` or `peft`."
    )


def layout_for(section: SaveSection, family: str, methods: Collection[str]) -> Layout:
    """A run's adapter is written in: the recipe's layout, else kohya's where the family has it, else diffusers'.

    methods: the rules'; with `full` alone there is no adapter, and nothing is checked. Raises RecipeError for a layout
    that the family does not have or that cannot hold the methods: before anything is trained.
    """
    layout: Layout = section.format or ("diffusers" if family in WITHOUT_KOHYA else "kohya")
    if set(methods) == {"full"}:
        return layout
    no_kohya = kohya_problem(family)
    if layout == "kohya" and no_kohya is not None:
        raise RecipeError(f"save.format: {no_kohya}")
    if section.bundle_tokens and layout != "kohya":
        raise RecipeError(f"save.bundle_tokens: the {layout} layout holds no tokens; remove it.")
    if problem := layout_problem(layout, methods, has_kohya=no_kohya is None):
        raise RecipeError(f"save.format: {problem}")
    return layout
