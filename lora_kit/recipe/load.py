"""A YAML file and overrides → Recipe, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_kit.errors import RecipeError, did_you_mean
from lora_kit.recipe.base import Problem, shown
from lora_kit.recipe.kohya import expand_sources
from lora_kit.recipe.messages import problems_in, recipe_error
from lora_kit.recipe.overrides import KeyPath, apply_overrides
from lora_kit.recipe.paths import Folder, escape_paths, resolve_paths
from lora_kit.recipe.rules import PresetRules
from lora_kit.recipe.sections import Recipe
from lora_kit.recipe.yaml12 import Tree, dump, parse

MAX_BYTES = 1_000_000
"""A recipe is a page of text; whatever is larger was named by mistake and is not read into memory."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.path=value` overrides, resolve its paths and check all of it.

    Paths in the file are relative to the file's folder, paths in overrides to the current folder; environment
    variables and `~` are expanded in both. `tiny` and hub ids stay as they are.

    Raises RecipeError with every problem at once, each with its dotted path.
    """
    path = Path(path)
    tree = _read_tree(path)
    _start_from_default_targets(tree, overrides)
    overridden, problems = apply_overrides(tree, overrides)
    tree.setdefault("output_dir", Recipe.model_fields["output_dir"].default)

    def folder_of(place: tuple[str | int, ...]) -> Folder:
        if _is_overridden(place, overridden):
            return Folder(Path.cwd(), "the current folder, as it is an override")
        return Folder(path.absolute().parent, f"the recipe's folder {path.absolute().parent}")

    problems += resolve_paths(tree, folder_of)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += problems_in(error)
        raise recipe_error(str(path), _marked(problems, overridden)) from error
    if problems:
        raise recipe_error(str(path), _marked(problems, overridden))
    return _with_subsets(recipe, path)


def dump_recipe(recipe: Recipe) -> str:
    """YAML of every field, defaults too, that `load_recipe` reads back as an equal recipe.

    The recipe's paths must be absolute, as load_recipe makes them.
    """
    tree: dict[str, Tree] = recipe.model_dump(mode="json")
    escape_paths(tree)
    return dump(tree)


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe, for editors; descriptions are the fields' docstrings."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _with_subsets(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with the subsets of its data-set TOMLs as sources."""
    held_out = recipe.validation.source
    if held_out is not None and held_out.path.lower().endswith(".toml"):
        said = "got a data-set TOML, which is several sources; name the folder of pictures that are held out."
        raise recipe_error(str(path), [Problem(("validation", "held_out", "path"), said)])
    data = expand_sources(recipe.data, path.absolute().parent)
    if data is recipe.data:
        return recipe
    try:
        return Recipe.model_validate({**recipe.model_dump(exclude_unset=True), "data": data})
    except ValidationError as error:
        raise recipe_error(f"{path}, with what its data-set TOML says", problems_in(error)) from error


def _read_tree(path: Path) -> dict[str, Tree]:
    tree = parse(_read_text(path), str(path))
    if tree is None:
        raise RecipeError(f"{path}: is empty. A recipe needs at least `data: {{sources: [{{path: my_pictures}}]}}`.")
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else f"the single value {shown(tree)}"
        raise RecipeError(f"{path}: got {kind} at the top; a recipe is a mapping with keys such as `data:`.")
    return tree


def _read_text(path: Path) -> str:
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".yaml", ".yml"))
        inside = f" In it: {', '.join(names[:10])}." if names else ""
        raise RecipeError(f"{path}: is a folder; name the recipe's YAML file.{inside}")
    if not path.exists():
        near = did_you_mean(path.name, _names(path.parent))
        raise RecipeError(f"{path}: no such recipe; looked for {path.absolute()}.{near}")
    try:
        if path.stat().st_size > MAX_BYTES:
            size = f"{path.stat().st_size / 1e6:.1f} MB"
            raise RecipeError(f"{path}: is {size} large; a recipe is a small YAML file, of at most 1 MB.")
        # utf-8-sig: Windows editors put a byte order mark first.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}.") from error


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _start_from_default_targets(tree: dict[str, Tree], overrides: Sequence[str]) -> None:
    """Let `targets.rank=8` change the default preset's rank where the recipe says nothing of targets."""
    if tree.get("targets") is None and any(override.startswith("targets.") for override in overrides):
        default = Recipe.model_fields["targets"].default
        assert isinstance(default, PresetRules)
        tree["targets"] = {"preset": default.preset}


def _is_overridden(place: tuple[str | int, ...], overridden: Sequence[KeyPath]) -> bool:
    names = tuple(map(str, place))
    return any(names[: len(path)] == path for path in overridden)


def _marked(problems: Sequence[Problem], overridden: Sequence[KeyPath]) -> list[Problem]:
    """The problems, saying which of them come from an override."""
    return [
        Problem(path, f"{message} (Set by an override.)" if _is_overridden(path, overridden) else message)
        for path, message in problems
    ]
