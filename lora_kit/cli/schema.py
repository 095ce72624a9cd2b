"""`lora-kit schema`: the recipe's JSON schema."""

from __future__ import annotations

import json

import typer

from lora_kit.recipe import recipe_schema


def command() -> None:
    """Print the recipe's JSON schema, with every field's description and default.

    Editors complete and check recipes with it: `lora-kit schema > recipe.schema.json`, then begin a recipe with
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
