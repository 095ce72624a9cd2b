"""`lora-kit train`: what scripts/train_lora.py runs in each process."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    recipe: Annotated[str, typer.Argument(help="A YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the recipe's own.")] = None,
) -> None:
    """Train as the recipe says. Ctrl-C finishes the step, saves, and stops."""
    from lora_kit.allocator import keep_freed_blocks
    from lora_kit.cli.quick_imports import quick_imports, uses_bitsandbytes
    from lora_kit.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())  # before torch: a typo is answered at once
    keep_freed_blocks()
    with quick_imports(compiles=uses_bitsandbytes(loaded)):
        from lora_kit.training import train

    outcome = train(loaded)
    if outcome.is_main:
        for line in outcome.lines():
            typer.echo(line, err=True)
