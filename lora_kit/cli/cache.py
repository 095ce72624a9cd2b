"""`lora-kit cache`: fill the cache ahead of training, verify it, prune it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_kit.allocator import keep_freed_blocks
from lora_kit.cli.quick_imports import quick_imports
from lora_kit.cli.text import byte_size
from lora_kit.errors import RecipeError

if TYPE_CHECKING:
    from lora_kit.recipe import Recipe


def command(
    recipes: Annotated[list[str], typer.Argument(help="YAML recipes, and key.path=value over all of theirs.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read everything that is kept, and the pictures.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Show what none of the recipes needs.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --prune: delete it.")] = False,
) -> None:
    """Encode each recipe's pictures and captions that are not in its cache yet, as training with data.cache: disk does.
    Ctrl-C loses a minute's work at most.

    --verify compares every entry with its checksum, and every picture with what is remembered of it; what is damaged
    is set aside, and encoded again when it is needed. Exit status 1 if anything was.

    --prune counts what none of the recipes needs. It deletes nothing without --yes. Name all recipes that share the
    cache.
    """
    loaded = _load(recipes)
    if verify and prune:
        raise RecipeError("--verify and --prune: got both; verify first, then prune.")
    if yes and not prune:
        raise RecipeError("--yes: allowed only with --prune, the one option that deletes anything.")
    if prune:
        _prune(loaded, yes)
    elif verify:
        _verify(loaded)
    else:
        _fill(loaded)


def _load(arguments: Sequence[str]) -> list[Recipe]:
    from lora_kit.recipe import load_recipe

    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).exists()]
    paths = [argument for argument in arguments if argument not in overrides]
    if not paths:
        raise RecipeError(f"lora-kit cache: got only overrides ({', '.join(overrides)}); name a recipe before them.")
    return [load_recipe(path, overrides) for path in paths]


def _fill(recipes: Sequence[Recipe]) -> None:
    for recipe in recipes:
        if recipe.data.cache != "disk":
            raise RecipeError(
                f"data.cache: got {recipe.data.cache}, with which nothing is kept on disk. Set it to disk in the "
                "recipe, or add data.cache=disk here and when you train."
            )
    keep_freed_blocks()
    with quick_imports():
        from lora_kit.models.first_stage import vae_factor
    from lora_kit.progress import progress
    from lora_kit.training.caching import data_sets, fill_cache, open_cache
    from lora_kit.training.encoders import load_encoders, trains_text_encoder
    from lora_kit.training.processes.launch import build_accelerator
    from lora_kit.training.processes.launcher import follow_launcher

    for recipe in map(follow_launcher, recipes):
        bundle = load_encoders(recipe)
        cache = open_cache(recipe, bundle, trains_text_encoder(recipe, bundle))
        accelerator = build_accelerator(recipe)
        for data in data_sets(recipe, cache.hints, progress, vae_factor(bundle), bundle.has_text):
            filled = fill_cache(cache, data, bundle, accelerator, progress)
            views = len(filled.latents) * filled.latents.versions if filled.latents else 0
            captions = len(filled.texts) if filled.texts else 0
            told = _fraction(filled.captions_encoded, captions)
            typer.echo(f"pictures: {_fraction(filled.encoded, views)}; captions: {told}")
            for line in (*data.notices, *(f"skipped {flaw.id}: {flaw.reason}" for flaw in data.skipped)):
                typer.echo(line, err=True)
        for line in cache.store.notices:
            typer.echo(line, err=True)
        typer.echo(f"cache: {len(cache.store):,} entries in {cache.store.folder}")


def _fraction(encoded: int, of: int) -> str:
    return f"{encoded:,} of {of:,} encoded" if of else "none kept"


def _verify(recipes: Sequence[Recipe]) -> None:
    from lora_kit.data.cache import CacheStore, PictureHints, verify_hints, verify_store
    from lora_kit.progress import progress
    from lora_kit.recipe.cache import cache_folder
    from lora_kit.training.caching import data_sets

    bad = 0
    for folder in dict.fromkeys(cache_folder(recipe.data) for recipe in recipes):
        found = verify_store(CacheStore(folder), progress)
        typer.echo(
            f"{folder}: {found.entries:,} entries in {found.shards:,} shards are whole ({byte_size(found.size)}); "
            f"{len(found.damage):,} damaged"
        )
        bad += len(found.damage)
        for line in found.damage:
            typer.echo(line, err=True)
    for recipe in recipes:
        hints = PictureHints(cache_folder(recipe.data))
        records = [record for data in data_sets(recipe, hints, progress) for record in data.records]
        changed = verify_hints(hints, records, progress)
        bad += len(changed)
        for name in changed:
            typer.echo(f"{name} changed and kept its size and time; it will be encoded again", err=True)
        typer.echo(f"pictures: {len(records):,} compared, {len(changed):,} not what was remembered")
    if bad:
        raise typer.Exit(1)


def _prune(recipes: Sequence[Recipe], yes: bool) -> None:
    from lora_kit.recipe.cache import cache_folder

    folders = sorted({str(cache_folder(recipe.data)) for recipe in recipes})
    if len(folders) > 1:
        raise RecipeError(f"--prune: the recipes keep things in {' and '.join(folders)}; prune one folder at a time.")
    from lora_kit.data.cache import CacheStore, plan_pruning, prune
    from lora_kit.progress import progress
    from lora_kit.training.caching import wanted_keys

    wanted = set[bytes]().union(*(wanted_keys(recipe, progress) for recipe in recipes))
    store = CacheStore(Path(folders[0]))
    plan = plan_pruning(store, wanted)
    total = len(store)
    verb = "removed" if yes else "would go"
    if yes:
        prune(store, plan)
    who = "this recipe needs" if len(recipes) == 1 else f"these {len(recipes)} recipes need"
    typer.echo(f"{folders[0]}: {total:,} entries, of which {who} {total - plan.drop:,}")
    typer.echo(f"{plan.drop:,} entries {verb} ({byte_size(plan.drop_size)})")
    typer.echo(f"{len(plan.leftovers):,} damaged or unfinished files {verb} ({byte_size(plan.leftovers_size)})")
    if not yes and (plan.drop or plan.leftovers):
        typer.echo("Nothing was deleted. Add --yes to delete it.")
