"""Adapters and their strengths → what is added to which rows of which file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from lora_kit.adapters.state import AdapterState
from lora_kit.adapters.updates import Update
from lora_kit.errors import AdapterFileError, ModelError, RecipeError
from lora_kit.merging.base import Base
from lora_kit.merging.delta import ScaledUpdate
from lora_kit.merging.fuse import Part
from lora_kit.merging.stored import MERGEABLE, dtype_name
from lora_kit.targeting.block_scales import check_depth, module_scales

SHOWN = 10


class Scaled(NamedTuple):
    """An adapter and the strength it is wanted at."""

    state: AdapterState
    scale: float


Parts = dict[tuple[int, str], list[Part]]
"""(file, key) → what is added to its rows."""
Updates = dict[str, tuple[ScaledUpdate, ...]]
"""Module → what changes it. The strengths are final."""


def wanted_updates(base: Base, adapters: Sequence[Scaled], specs: Sequence[str]) -> Updates:
    """Every adapter's updates at scale × the number that `specs` give the module (see `block_scales`).

    Updates at strength 0 are left out. Raises RecipeError if a spec is wrong, or if nothing is left to merge.
    """
    names = [name for name in base.places.modules if any(name in state.updates for state, _ in adapters)]
    strengths = module_scales(names, 1.0, specs)
    check_depth(list(base.places.modules), specs)
    found: Updates = {}
    for name in names:
        updates = [
            ScaledUpdate(state.updates[name], scale * strengths[name])
            for state, scale in adapters
            if name in state.updates and scale * strengths[name]
        ]
        if updates:
            found[name] = tuple(updates)
    if not found:
        raise RecipeError("nothing to merge: no adapter was given at a scale other than 0")
    return found


def wanted_parts(base: Base, updates: Updates) -> Parts:
    """Where each update goes. Raises AdapterFileError for a bias that the base does not have."""
    parts: Parts = {}
    missing: list[str] = []
    for name, scaled in updates.items():
        shape = base.places.modules[name].shape
        weights = tuple(one for one in scaled if _changes_weight(one.update))
        biases = tuple(one for one in scaled if _changes_bias(one.update, shape[0]))
        if weights:
            place = base.places.weights[name]
            part = Part(name, "weight", place.start, place.stop, shape, weights)
            parts.setdefault((place.file, place.key), []).append(part)
        if biases and name not in base.places.biases:
            missing.append(name)
        elif biases:
            place = base.places.biases[name]
            part = Part(name, "bias", place.start, place.stop, shape[:1], biases)
            parts.setdefault((place.file, place.key), []).append(part)
    if missing:
        listed = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
        raise AdapterFileError(f"an adapter changes biases that {base.path} does not have: {listed}")
    return parts


def wanted_dtypes(base: Base, parts: Parts, dtype: torch.dtype | None) -> list[dict[str, torch.dtype]]:
    """For each file: key → the precision it is written in, where that is asked for.

    With `dtype`, every floating-point tensor of the components that change is cast to it; the rest of a single file
    (VAE, averaged copies) stays as it is. Raises ModelError for a precision that a sum cannot be written in.
    """
    _refuse_unmergeable(base, parts, dtype)
    if dtype is None:
        return [{} for _ in base.files]
    touched = {base.component_of(*place) for place in parts}
    return [
        {
            tensor.key: dtype
            for tensor in file.tensors.values()
            if tensor.dtype.is_floating_point and base.component_of(number, tensor.key) in touched
        }
        for number, file in enumerate(base.files)
    ]


def _refuse_unmergeable(base: Base, parts: Parts, dtype: torch.dtype | None) -> None:
    for number, key in parts:
        stored = base.files[number].tensors[key].dtype
        if stored in MERGEABLE or (dtype and stored.is_floating_point):
            continue
        fix = "Use --dtype fp16, bf16 or fp32." if stored.is_floating_point else "Take a base that is not quantised."
        raise ModelError(
            f"{base.files[number].path}: {key} is stored as {dtype_name(stored)}, which a sum is not written in. {fix}"
        )


def by_component(base: Base, parts: Parts) -> dict[str, dict[tuple[int, str], list[Part]]]:
    """Component → its parts."""
    found: dict[str, dict[tuple[int, str], list[Part]]] = {}
    for place, some in parts.items():
        component = base.component_of(*place)
        assert component is not None, f"{place} belongs to no component"
        found.setdefault(component, {})[place] = some
    return found


def all_parts(parts: Mapping[tuple[int, str], Sequence[Part]]) -> Iterator[tuple[tuple[int, str], Part]]:
    """(file and key, part), in the order of the files."""
    for place in sorted(parts):
        for part in parts[place]:
            yield place, part


def _changes_weight(update: Update) -> bool:
    """`full` and `norm` may hold a bias alone; telling costs them no arithmetic."""
    return update.method not in ("full", "norm") or update.weight_delta(1.0) is not None


def _changes_bias(update: Update, size: int) -> bool:
    return update.bias_delta(1.0, torch.zeros(size)) is not None
