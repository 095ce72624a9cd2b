"""A file's tensors against a model: every disagreement is found and told at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters.formats.layout import Layout, RawUpdate
from lora_kit.adapters.updates import Update, build_update
from lora_kit.errors import AdapterFileError, did_you_mean
from lora_kit.targeting.modules import ModuleInfo

SHOWN = 40
SHOWN_SHORT = 3
HINTED = 5


class MisfitError(AdapterFileError):
    """A file's tensors do not fit the model."""

    def __init__(self, path: Path, shapes: list[str], others: list[str]) -> None:
        """The problems with modules that are there (their shapes, first of all), and the others."""
        self._path, self._problems = path, [*shapes, *others]
        super().__init__(self._told(SHOWN))

    def short(self) -> str:
        """The first problems alone, for a file that belongs to another model altogether."""
        return self._told(SHOWN_SHORT)

    def _told(self, shown: int) -> str:
        problems = self._problems
        lines = [f"{self._path} does not fit the model ({len(problems)} problems); nothing was loaded:"]
        lines += [f"  {problem}" for problem in problems[:shown]]
        if len(problems) > shown:
            lines.append(f"  … and {len(problems) - shown} more")
        return "\n".join(lines)


class Split(NamedTuple):
    """A file's tensors by module, and the keys that are no part of an update."""

    updates: dict[str, RawUpdate]
    unknown: tuple[str, ...]


def split(layout: Layout, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Split:
    """Group the tensors by the module spelling of the file."""
    updates: dict[str, RawUpdate] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        parsed = layout.parse(key)
        if parsed is None or (parsed.part == "alpha" and tensor.numel() != 1):
            unknown.append(key)
            continue
        raw = updates.get(parsed.module, RawUpdate())
        if parsed.part == "alpha":
            updates[parsed.module] = replace(raw, alpha=float(tensor))
        else:
            updates[parsed.module] = replace(raw, parts=raw.parts | {parsed.part: tensor})
    for module, alpha in layout.alphas(updates, metadata).items():
        if updates[module].alpha is None:
            updates[module] = replace(updates[module], alpha=alpha)
    return Split(updates, tuple(unknown))


def fit(path: Path, layout: Layout, parts: Split, modules: Mapping[str, ModuleInfo]) -> dict[str, Update]:
    """The updates under the model's dotted names, as stored, in the model's order and shapes.

    Raises one MisfitError that lists every wrong shape, non-finite value, missing part and unknown key.
    """
    shapes: list[str] = []
    problems = [f"{key}: unknown key" for key in parts.unknown]
    unknown: list[str] = []
    spellings = layout.spellings(modules)
    found: dict[str, Update] = {}
    for spelling, raw in sorted(parts.updates.items()):
        name = spellings.get(spelling)
        if name is None:
            unknown.append(spelling)
            continue
        if name in found:
            problems.append(f"{spelling}: {name} is in the file twice, under two spellings")
            continue
        try:
            found[name] = _built(raw, modules[name])
        except AdapterFileError as error:
            shapes.append(f"{spelling}: {error}")
    for index, spelling in enumerate(unknown):
        # A guess costs a comparison with every name, so only some that will be read get one.
        hint = did_you_mean(spelling, spellings) if index < HINTED and len(shapes) < SHOWN else ""
        problems.append(f"{spelling}: no such module in the model.{hint}")
    if shapes or problems:
        raise MisfitError(path, shapes, problems)
    return {name: found[name] for name in modules if name in found}


def _built(raw: RawUpdate, module: ModuleInfo) -> Update:
    """The module's update. Raises AdapterFileError, without the module's name."""
    update = build_update(_copied(raw.parts), raw.alpha, module.shape)
    if update.bias_delta(1.0) is not None and module.parameters == prod(module.shape):
        raise AdapterFileError("changes the module's bias, but it has none")
    return update


def _copied(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy: the file's own tensors may be mapped from disk."""
    return {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
