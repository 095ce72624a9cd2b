"""Adapter files under dotted module names, with or without their base."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_kit.adapters.formats.fit import fit
from lora_kit.adapters.io import RawAdapter, read_raw
from lora_kit.adapters.state import AdapterState
from lora_kit.errors import AdapterFileError
from lora_kit.models.known_trees import known_trees
from lora_kit.models.outline import read_outline
from lora_kit.recipe import ModelSection
from lora_kit.targeting import ModuleInfo

Modules = Mapping[str, ModuleInfo]


class OpenedAdapter(NamedTuple):
    """One file, read whole and checked."""

    path: Path
    layout: str
    base: str
    """The base whose modules it was read against: `sd1`, `sd2` … or what `--base` says."""
    modules: Modules
    """That base's modules by dotted name, in its order."""
    state: AdapterState
    sha256: str
    """Of the file's bytes."""


def open_adapters(paths: Sequence[Path], base: str | None = None) -> list[OpenedAdapter]:
    """Read files that belong to one base: `base`, or the first of SD1, SD2, their inpainting models and `tiny` that
    all of them fit.

    Raises AdapterFileError with everything that does not fit, and where the files belong to different bases.
    """
    raws = {path: read_raw(path) for path in paths}
    trees = _trees(base)
    fitting = {path: _states(path, raw, trees) for path, raw in raws.items()}
    common = [name for name in trees if all(name in states for states in fitting.values())]
    if not common:
        told = "; ".join(f"{path} belongs to {' or '.join(states)}" for path, states in fitting.items())
        raise AdapterFileError(f"the files belong to different bases: {told}. Only adapters of one base go together.")
    name = common[0]
    modules = {module.name: module for module in trees[name]}
    return [
        OpenedAdapter(path, raws[path].layout.name, name, modules, fitting[path][name], file_hash(path))
        for path in paths
    ]


def file_hash(path: Path) -> str:
    """Sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fitting_bases(path: Path, raw: RawAdapter, base: str | None = None) -> dict[str, AdapterState]:
    """Name of a base → the file under its dotted names, for every known base (or `base` alone) that it fits."""
    return _fitting(path, raw, _trees(base)).states


class _Fitting(NamedTuple):
    states: dict[str, AdapterState]
    errors: dict[str, AdapterFileError]


def _trees(base: str | None) -> dict[str, tuple[ModuleInfo, ...]]:
    return known_trees() if base is None else {base: tuple(read_outline(ModelSection(base=base)).tree)}


def _fitting(path: Path, raw: RawAdapter, trees: Mapping[str, Sequence[ModuleInfo]]) -> _Fitting:
    states: dict[str, AdapterState] = {}
    errors: dict[str, AdapterFileError] = {}
    for name, tree in trees.items():
        modules = {module.name: module for module in tree}
        try:
            states[name] = AdapterState(fit(path, raw.layout, raw.parts, modules), raw.metadata)
        except AdapterFileError as error:
            errors[name] = error
    return _Fitting(states, errors)


def _states(path: Path, raw: RawAdapter, trees: Mapping[str, Sequence[ModuleInfo]]) -> dict[str, AdapterState]:
    """`_fitting`, raising what the nearest base says of the file if it fits none."""
    found = _fitting(path, raw, trees)
    if found.states:
        return found.states
    nearest = min(found.errors, key=lambda name: str(found.errors[name]).count("\n"))
    if len(trees) == 1:
        raise found.errors[nearest]
    raise AdapterFileError(
        f"{found.errors[nearest]}\n(tried {', '.join(trees)}; this is what {nearest} says. --base names another base)"
    )
