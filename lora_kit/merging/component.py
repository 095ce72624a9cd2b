"""Fuse updates into one component's weight file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters.formats.container import write_safetensors
from lora_kit.errors import ModelError
from lora_kit.merging.delta import ScaledUpdate, total_delta
from lora_kit.merging.verify import rounding_share, sample_of
from lora_kit.merging.weights import ComponentFiles, read_weights

Wanted = Mapping[str, Sequence[ScaledUpdate]]
"""Dotted module name → what is added to its weight."""


class MergedComponent(NamedTuple):
    """What was written."""

    dtypes: tuple[str, ...]
    """Precisions of the changed weights."""
    shares: dict[str, float]
    """Of a sample of weights: error against float64, as a share of what rounding allows."""
    note: str | None


def merge_component(
    files: ComponentFiles, wanted: Wanted, folder: Path, dtype: torch.dtype | None, record: str
) -> MergedComponent:
    """Write `folder/<one safetensors file>`: the component's weights with every ΔW added in fp32 and cast once.

    Only the wanted weights change; with `dtype` all floating-point ones are cast to it. `record` goes into the
    header as `lora_kit.merged`. Raises ModelError if a weight is missing, of another shape, or overflows `dtype`.
    """
    tensors, metadata = read_weights(files)
    merged = {key: _cast(tensor, dtype, key) for key, tensor in tensors.items()}
    keys = {name: _weight_key(files, tensors, name) for name in wanted}
    for name, key in keys.items():
        weight = tensors[key].float()
        delta = total_delta(wanted[name], weight=weight)
        exact = weight if delta is None else weight + delta
        merged[key] = _cast(exact, dtype or tensors[key].dtype, key)
    shares = {
        name: rounding_share(tensors[keys[name]], merged[keys[name]], wanted[name]) for name in sample_of(list(wanted))
    }
    write_safetensors(folder / files.merged_name, merged, {"format": "pt", **metadata, "lora_kit.merged": record})
    dtypes = sorted({str(merged[key].dtype).removeprefix("torch.") for key in keys.values()})
    return MergedComponent(tuple(dtypes), shares, _note(files))


def _cast(tensor: Tensor, dtype: torch.dtype | None, key: str) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        largest = float(tensor.abs().max())
        raise ModelError(
            f"{key}: its largest value {largest:.4g} does not fit into {str(dtype).removeprefix('torch.')}. "
            "Nothing was written; use --dtype bf16 or fp32."
        )
    return cast


def _weight_key(files: ComponentFiles, tensors: Mapping[str, Tensor], name: str) -> str:
    """The file's key of a module's weight; the text encoder's inner `text_model` may be there or not."""
    inner = name.partition(".")[2]
    bare = inner.removeprefix("text_model.")
    for spelling in (inner, bare, f"text_model.{bare}"):
        if f"{spelling}.weight" in tensors:
            return f"{spelling}.weight"
    raise ModelError(f"{files.weights[0]}: has no weight {inner}.weight, which an adapter changes")


def _note(files: ComponentFiles) -> str | None:
    """What else changed about the component's files, for the user."""
    left_out = [path.name for path in files.all_weights if path not in files.weights and "index" not in path.name]
    notes: list[str] = []
    read = [path.name for path in files.weights]
    if read != [files.merged_name]:
        old = f"{len(read)} shards" if len(read) > 1 else read[0]
        notes.append(f"{old} became {files.merged_name}")
    if left_out:
        notes.append(f"left out, not merged: {', '.join(left_out)}")
    return f"{files.folder.name}: {'; '.join(notes)}" if notes else None
