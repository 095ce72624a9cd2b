"""How large a recipe's forward passes are."""

from __future__ import annotations

from lora_kit.recipe import Recipe


def picture_side(recipe: Recipe) -> int:
    """Of the largest pictures that are trained on, as a square: buckets have as many pixels."""
    sides = {source.resolution or recipe.data.resolution for source in recipe.data.sources}
    several = recipe.data.buckets.resolutions if recipe.data.buckets else None
    return max(sides | set(several or ()))


def micro_batch(recipe: Recipe) -> int:
    """Pictures in the largest forward pass of one process."""
    return min(recipe.train.micro_batch_size or recipe.data.batch_size, recipe.data.batch_size)


def keeps_latents(recipe: Recipe) -> bool:
    """Whether steps find latents at hand; else the VAE is part of a step."""
    return recipe.data.cache != "none" and recipe.data.crop == "center"
