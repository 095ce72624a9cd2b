"""Adapter files under dotted module names, with or without their base."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_kit.adapters.formats.family import family_of
from lora_kit.adapters.io import RawAdapter, fitted, read_raw
from lora_kit.adapters.state import AdapterState
from lora_kit.errors import AdapterFileError
from lora_kit.merging.other_family import fitted_to
from lora_kit.models.known_trees import known_trees
from lora_kit.models.outline import read_outline
from lora_kit.recipe import ModelSection
from lora_kit.targeting import ModuleInfo

Trees = Mapping[str, Sequence[ModuleInfo]]


class OpenedAdapter(NamedTuple):
    """One file, read whole and checked."""

    path: Path
    layout: str
    base: str
    """The base whose modules it was read against: `sd1`, `sd2` … or what `--base` says."""
    state: AdapterState
    sha256: str
    """Of the file's bytes; of a folder, of the hashes of its files in the order of their names."""


def open_adapters(paths: Sequence[Path], base: str | None = None) -> list[OpenedAdapter]:
    """Read files that belong to one base: `base`, or the first of SD1, SD2, their inpainting models and `tiny` that
    all of them fit.

    Raises AdapterFileError with everything that does not fit, and where the files belong to different bases.
    """
    raws = {path: read_raw(path) for path in paths}
    trees = {base: _tree(base)} if base is not None else known_trees()
    for name in _likely(list(raws.values()), trees):
        tried = {path: _fitted(path, raw, trees[name]) for path, raw in raws.items()}
        states = {path: state for path, state in tried.items() if isinstance(state, AdapterState)}
        if len(states) == len(raws):
            return [OpenedAdapter(path, raws[path].layout.name, name, states[path], file_hash(path)) for path in paths]
    alone = {path: fitting_base(path, raw, base)[0] for path, raw in raws.items()}
    told = "; ".join(f"{path} belongs to {name}" for path, name in alone.items())
    raise AdapterFileError(f"the files belong to different bases: {told}. Only adapters of one base go together.")


def fitting_base(path: Path, raw: RawAdapter, base: str | None = None) -> tuple[str, AdapterState]:
    """The first known base (or `base` alone) that a file fits, and the file under its dotted names.

    Raises AdapterFileError with what the nearest base says of the file if it fits none.
    """
    trees = {base: _tree(base)} if base is not None else known_trees()
    errors: dict[str, AdapterFileError] = {}
    for name in _likely([raw], trees):
        state = _fitted(path, raw, trees[name])
        if isinstance(state, AdapterState):
            return name, state
        errors[name] = state
    nearest = min(errors, key=lambda name: str(errors[name]).count("\n"))
    if base is not None:
        fitted_to(path, raw, {module.name: module for module in trees[base]}, base)  # names both families
    raise AdapterFileError(
        f"{errors[nearest]}\n(tried {', '.join(trees)}; this is what {nearest} says. --base names another base)"
    )


def told_family(metadata: Mapping[str, str], base: str) -> str:
    """The family by an adapter's header, else by the base that it was read against: a known one's name, or a path."""
    return family_of(metadata) or (base if base in known_trees() else read_outline(ModelSection(base=base)).family)


def file_hash(path: Path) -> str:
    """Sha256 (hex) of a file's bytes; of a folder, of its files' hashes in the order of their names."""
    if path.is_dir():
        hashes = [file_hash(inner) for inner in sorted(path.rglob("*")) if inner.is_file()]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tree(base: str) -> list[ModuleInfo]:
    # What the network predicts does not matter here, and a single file may not say it.
    return read_outline(ModelSection(base=base, prediction_type="epsilon")).tree


def _likely(raws: Sequence[RawAdapter], trees: Trees) -> list[str]:
    """The bases that lack the fewest of the files' modules: names cost little to look at, tensors more."""
    unknown = {name: sum(_unknown_names(raw, tree) for raw in raws if len(trees) > 1) for name, tree in trees.items()}
    return [name for name in trees if unknown[name] == min(unknown.values())]


def _unknown_names(raw: RawAdapter, tree: Sequence[ModuleInfo]) -> int:
    try:
        spellings = raw.layout.spellings(module.name for module in tree)
    except AdapterFileError:  # keys that are positions are all of another model, or none is
        return len(raw.parts.updates)
    return sum(spelling not in spellings for spelling in raw.parts.updates)


def _fitted(path: Path, raw: RawAdapter, tree: Sequence[ModuleInfo]) -> AdapterState | AdapterFileError:
    try:
        return fitted(path, raw, {module.name: module for module in tree})
    except AdapterFileError as error:
        return error
