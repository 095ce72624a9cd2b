"""The adapters of a merge, read against the base's names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_kit.adapters.formats.family import family_of
from lora_kit.adapters.io import read_raw
from lora_kit.adapters.state import AdapterState
from lora_kit.adapters.updates import build_update
from lora_kit.errors import AdapterFileError
from lora_kit.merging.base import Base
from lora_kit.merging.other_family import fitted_to
from lora_kit.merging.wanted import Scaled

Source = AdapterState | Path


def read_sources(base: Base, adapters: Sequence[tuple[Source, float]]) -> tuple[list[Scaled], list[str]]:
    """(the adapters, warnings about those that say they are for another family yet fit).

    Raises one AdapterFileError for everything that does not fit, in all of the files.
    """
    found: list[Scaled] = []
    notes: list[str] = []
    problems: list[str] = []
    for source, scale in adapters:
        if isinstance(source, AdapterState):
            problems += _misfits(base, source)
            found.append(Scaled(source, scale))
            continue
        try:
            raw = read_raw(source)
            state = fitted_to(source, raw, base.places.modules, str(base.path), base.family)
        except AdapterFileError as error:
            problems.append(str(error))
            continue
        family = family_of(raw.metadata)
        if family is not None and base.family not in (None, family):
            notes.append(f"{source.name} says it is for {family}, the base is {base.family}; all its shapes fit")
        if state.embeddings:
            tokens = ", ".join(sorted(state.embeddings))
            notes.append(f"{source.name}: its learned tokens ({tokens}) are no weights, and are not in the merged base")
        found.append(Scaled(state, scale))
    if problems:
        raise AdapterFileError("\n".join(problems))
    return found, notes


def _misfits(base: Base, state: AdapterState) -> Iterator[str]:
    """What of an adapter in memory does not fit the base."""
    for name, update in state.updates.items():
        module = base.places.modules.get(name)
        if module is None:
            yield f"{name}: no such module in {base.path}"
            continue
        try:
            build_update(update.parts(), getattr(update, "alpha", None), module.shape)
        except AdapterFileError as error:
            yield f"{name}: {error}"
