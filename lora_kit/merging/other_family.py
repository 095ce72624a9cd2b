"""An adapter held against a base, and what is said where it is another family's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_kit.adapters.formats.family import family_of
from lora_kit.adapters.formats.fit import MisfitError
from lora_kit.adapters.io import RawAdapter, fitted
from lora_kit.adapters.state import AdapterState
from lora_kit.errors import AdapterFileError
from lora_kit.models.tree_family import family_of_tree
from lora_kit.targeting import ModuleInfo


def fitted_to(
    path: Path, raw: RawAdapter, modules: Mapping[str, ModuleInfo], base: str, family: str | None = None
) -> AdapterState:
    """`fitted`, whose error names both families and the first shapes that differ where the file is another's.

    base: what the base is called in the message. family: the base's; None: as its modules tell. What the file was
    trained on its header says; where it does not, the known bases' shapes do.
    """
    try:
        return fitted(path, raw, modules)
    except MisfitError as error:
        own = family or family_of_tree(modules)
        said = family_of(raw.metadata)
        theirs = said or _family_by_shapes(path, raw)
        if own is None or theirs is None or theirs == own:
            raise
        how = "" if said else " (by its shapes: its header does not say)"
        head = f"{path} was trained on {theirs}{how}, and {base} is {own}: give the base it belongs to."
        raise AdapterFileError(f"{head}\n{error.short()}") from error


def _family_by_shapes(path: Path, raw: RawAdapter) -> str | None:
    """The first known base that the file fits."""
    from lora_kit.models.known_trees import known_trees  # here: a merge that goes well needs no recipe

    for name, tree in known_trees().items():
        try:
            fitted(path, raw, {module.name: module for module in tree})
        except AdapterFileError:
            continue
        return name
    return None
