"""Paths in a recipe: variables and `~` are expanded, relative ones are made absolute, hub ids are left alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_kit.errors import did_you_mean
from lora_kit.recipe.base import EMBEDDING_FILES, Problem
from lora_kit.recipe.yaml12 import Tree

_VARIABLE = re.compile(r"\$(?:\$|(\w+)|\{(\w+)\})", re.ASCII)
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_DATA_SET_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


class Folder(NamedTuple):
    """What relative paths are relative to."""

    path: Path
    name: str
    """`the recipe's folder` or `the current folder`, for messages."""


class _Place(NamedTuple):
    """One field that holds a path."""

    path: tuple[str | int, ...]
    text: str
    put: Callable[[str], None]


class _PathError(Exception):
    """Why a path cannot be resolved."""


def resolve_paths(tree: dict[str, Tree], folder_of: Callable[[tuple[str | int, ...]], Folder]) -> list[Problem]:
    """Resolve every path in the recipe's tree, in place; returns what is wrong with the others.

    folder_of: what the path at some place in the tree is relative to.
    """
    problems: list[Problem] = []
    for place in _places(tree):
        try:
            place.put(_resolve(place, folder_of(place.path)))
        except _PathError as error:
            problems.append(Problem(place.path, str(error)))
    return problems


def escape_paths(tree: dict[str, Tree]) -> None:
    """Double each `$` in the paths of a recipe's tree, in place, so that reading it back expands nothing."""
    for place in _places(tree):
        place.put(place.text.replace("$", "$$"))


def describe_lookup(path: str, folder: Path, name: str = "the recipe's folder") -> str:
    """Where `path` was looked for, for messages: `looked for /a/recipes/x (relative to the recipe's folder)`."""
    whole = absolute(path, folder)
    return f"looked for {whole}" if Path(path).is_absolute() else f"looked for {whole} (relative to {name})"


def absolute(path: str, folder: Path) -> Path:
    """`path` seen from `folder`, absolute, without `..`."""
    whole = (folder / path).absolute()
    # Resolved only when it must be: a user knows the names of links better than what they point at.
    return whole.resolve() if ".." in whole.parts else whole


def is_pattern(path: str) -> bool:
    """Whether a data source's path stands for several files, such as `shards/{000..019}.tar`."""
    return any(letter in path for letter in "*?{") and not Path(path).exists()


def expand(text: str) -> str:
    """`text` with `$NAME`, `${NAME}`, `~` and `~user` replaced; `$$` stands for `$`.

    Raises _PathError naming an undefined variable or an unknown user.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name is None:
            return "$"
        if name not in os.environ:
            raise _PathError(f'got "{text}", but the environment variable {name} is not set; set it or write the path.')
        return os.environ[name]

    expanded = _VARIABLE.sub(value, text)
    if not expanded.startswith("~"):
        return expanded
    try:
        return str(Path(expanded).expanduser())
    except RuntimeError as error:
        raise _PathError(f'got "{text}", but there is no such user; write the path.') from error


def _places(tree: dict[str, Tree]) -> Iterator[_Place]:
    yield from _place(tree.get("model"), ("model",), "base")
    yield from _place(tree.get("model"), ("model",), "tokenizer")
    yield from _place(tree.get("model"), ("model",), "adapter")
    data = tree.get("data")
    yield from _place(data, ("data",), "cache_dir")
    sources = data.get("sources") if isinstance(data, dict) else None
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        yield from _place(source, ("data", "sources", index), "path")
        yield from _place(source, ("data", "sources", index), "metadata_file")
        yield from _place(source, ("data", "sources", index), "mask_folder")
    validation = tree.get("validation")
    held_out = validation.get("held_out") if isinstance(validation, dict) else None
    yield from _place(held_out, ("validation", "held_out"), "path")
    yield from _place(held_out, ("validation", "held_out"), "metadata_file")
    yield from _place(held_out, ("validation", "held_out"), "mask_folder")
    yield from _place(tree.get("train"), ("train",), "resume")
    tokens = tree.get("tokens")
    for index, token in enumerate(tokens if isinstance(tokens, list) else []):
        started = token.get("initializer") if isinstance(token, dict) else None
        if isinstance(started, str) and started.lower().endswith(EMBEDDING_FILES):  # else words
            yield from _place(token, ("tokens", index), "initializer")
    yield from _place(tree, (), "output_dir")


def _place(parent: Tree, path: tuple[str | int, ...], key: str) -> Iterator[_Place]:
    """The place, if there is a text in it; what else may be there is refused when the recipe is checked."""
    if not isinstance(parent, dict):
        return
    text = parent.get(key)
    if isinstance(text, str) and text:

        def put(value: str) -> None:
            parent[key] = value

        yield _Place((*path, key), text, put)


def _resolve(place: _Place, folder: Folder) -> str:
    """The place's path, absolute; a hub id, `tiny` or `latest` as it is."""
    text = expand(place.text)
    match place.path:
        case ("model", "base"):
            return text if text == "tiny" else _local_or_hub(text, folder, _MODEL_ID, "a model's hub id (`org/name`)")
        case ("model", "tokenizer"):
            return _local_or_hub(text, folder, _MODEL_ID, "a model's hub id (`org/name`)")
        case (*_, "metadata_file" | "mask_folder" | "cache_dir"):
            return str(absolute(text, folder.path))
        case ("data", *_) | ("validation", *_) if is_pattern(text):
            return str(absolute(text, folder.path))
        case ("data", *_) | ("validation", *_):
            return _local_or_hub(text, folder, _DATA_SET_ID, "a data set's hub id")
        case ("train", "resume") if text == "latest":
            return text
        case _:
            return str(absolute(text, folder.path))


def _local_or_hub(text: str, folder: Folder, hub_id: re.Pattern[str], hub_name: str) -> str:
    local = absolute(text, folder.path)
    if local.exists():
        return str(local)
    # `data/cats` beside an existing folder `data` is a slip of the pen, not a user `data` of the hub.
    is_path = text.endswith(_CHECKPOINTS) or ("/" in text and local.parent.is_dir())
    if hub_id.fullmatch(text) and not is_path:
        return text
    looked = describe_lookup(text, folder.path, folder.name)
    other = "" if is_path else f", and it cannot be {hub_name}"
    raise _PathError(f'got "{text}", but there is no such file or folder: {looked}{other}.{_near(local)}')


def _near(missing: Path) -> str:
    """ "Did you mean" among the names that are there."""
    if not missing.parent.is_dir():
        return ""
    names: Sequence[str] = [entry.name for entry in missing.parent.iterdir()]
    return did_you_mean(missing.name, names)
