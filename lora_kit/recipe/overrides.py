"""`key.path=value` on the command line: set one value in a recipe's tree before it is checked."""

from __future__ import annotations

from collections.abc import Sequence

from lora_kit.errors import RecipeError
from lora_kit.recipe.base import Problem, shown
from lora_kit.recipe.yaml12 import Tree, parse

KeyPath = tuple[str, ...]


def apply_overrides(tree: dict[str, Tree], overrides: Sequence[str]) -> tuple[list[KeyPath], list[Problem]]:
    """Set each `key.path=value` in `tree`, in order; the value is read as YAML 1.2.

    List items go by index (`data.sources.0.path=x`); mappings that are missing on the way are made.
    Returns the paths that were set, and what is wrong with the others.
    """
    done: list[KeyPath] = []
    problems: list[Problem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            said = "an override reads key.path=value, such as optimizer.lr=1e-4."
            problems.append(Problem((f"override `{override}`",), said))
            continue
        try:
            value = parse(text, f"override `{override}`")
        except RecipeError as error:
            problems.append(Problem((), str(error)))
            continue
        problem = _set(tree, path, value)
        if problem is None:
            done.append(path)
        else:
            problems.append(problem)
    return done, problems


def _set(tree: dict[str, Tree], path: KeyPath, value: Tree) -> Problem | None:
    """Put `value` at `path`; if that cannot be, say why and leave the tree as it was."""
    place: Tree = tree
    for depth, key in enumerate(path):
        problem = _no_place(place, path, depth)
        if problem is not None:
            return problem
        below = _get(place, key)
        if below is None or depth == len(path) - 1:
            return _put(place, path, depth, value)
        place = below
    return None


def _get(place: Tree, key: str) -> Tree:
    if isinstance(place, list):
        return place[int(key)]
    assert isinstance(place, dict)
    return place.get(key)


def _put(place: Tree, path: KeyPath, depth: int, value: Tree) -> Problem | None:
    """Put `value` under path[depth] of `place`, in as many new mappings as the rest of the path names."""
    rest = path[depth + 1 :]
    index = next((n for n, key in enumerate(path) if n > depth and _is_index(key)), None)
    if index is not None:
        parent = ".".join(path[:index])
        return Problem(path, f"{parent} has no items in the recipe; set it whole, such as {parent}=[…].")
    for key in reversed(rest):
        value = {key: value}
    if isinstance(place, list):
        place[int(path[depth])] = value
    elif isinstance(place, dict):
        place[path[depth]] = value
    return None


def _no_place(place: Tree, path: KeyPath, depth: int) -> Problem | None:
    """Why `place`, found at path[:depth], cannot hold path[depth]; None if it can."""
    key = path[depth]
    parent = ".".join(path[:depth])
    if isinstance(place, list):
        if _is_index(key) and int(key) < len(place):
            return None
        allowed = f"an index from 0 to {len(place) - 1}" if place else "no index; set the whole list"
        return Problem(path, f"got `{key}` for an item of the list {parent}, which takes {allowed}.")
    if not isinstance(place, dict):
        said = f"{parent} is the single value {shown(place)} and has no `{key}` in it"
        return Problem(path, f"{said}; set {parent} itself.")
    return None


def _is_index(key: str) -> bool:
    return key.isascii() and key.isdigit()
