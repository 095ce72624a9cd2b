"""The adapters of a merge, read against the base's names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_kit.adapters.formats.family import family_of
from lora_kit.adapters.io import fit_adapter
from lora_kit.adapters.state import AdapterState
from lora_kit.adapters.updates import build_update
from lora_kit.errors import AdapterFileError, LoraKitError
from lora_kit.merging.base import Base
from lora_kit.merging.stored import open_weights
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
            state = fit_adapter(source, base.places.modules)
        except AdapterFileError as error:
            problems.append(f"{_other_family(base, source)}{error}")
            continue
        family = family_of(state.metadata)
        if family in ("sd1", "sd2") and base.family not in (None, family):
            notes.append(f"{source.name} says it is for {family}, the base is {base.family}; all its shapes fit")
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


def _other_family(base: Base, path: Path) -> str:
    """What to say first of a file that does not fit, if its header tells why."""
    try:
        family = family_of(open_weights(path).metadata) if path.suffix == ".safetensors" else None
    except LoraKitError:
        return ""
    if family is None or base.family is None or family == base.family:
        return ""
    return f"{path} was trained on {family}, and {base.path} is {base.family}: give the base it belongs to.\n"
