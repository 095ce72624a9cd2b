"""What a plan says of the tokens that a recipe learns. Their words are checked when the base's tokenizer is loaded."""

from __future__ import annotations

from typing import Any

from lora_kit.recipe import Recipe
from lora_kit.recipe.tokens import rate_of_token


def token_lines(recipe: Recipe) -> list[str]:
    """A line for each token."""
    lines: list[str] = []
    for one in recipe.tokens:
        count = "as many vectors as its beginning" if one.vectors is None else f"{one.vectors} vectors"
        count = "1 vector" if (one.vectors or 1) == 1 and one.initializer == "random" else count
        until = f", learned up to step {one.until:,}" if one.until else ""
        rate = rate_of_token(one, recipe.optimizer)
        lines.append(f"token {one.token}: {count} from {one.initializer}, learning rate {rate:g}{until}")
    return lines


def token_json(recipe: Recipe) -> list[dict[str, Any]]:
    """The tokens with their rates."""
    return [one.model_dump() | {"lr": rate_of_token(one, recipe.optimizer)} for one in recipe.tokens]
