"""A weight file as it lies on disk: where each tensor is, and a mapped view of it. safetensors, .ckpt or .bin."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lora_kit.adapters.formats.container_header import DTYPES
from lora_kit.errors import ModelError
from lora_kit.models.single_file.checkpoint_file import damaged, open_pickled, refuse_text

NAMES = {dtype: name for name, dtype in DTYPES.items()}
MERGEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Precisions that a weight can be written in."""
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


class StoredTensor(NamedTuple):
    """One tensor of a file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFile(NamedTuple):
    """An open file; its pages are mapped, not read."""

    path: Path
    tensors: dict[str, StoredTensor]
    """By key, in the order of their values in the file."""
    metadata: dict[str, str]
    read: Callable[[str], Tensor]
    """The tensor of a key, on the file's own pages where that can be: never write to it."""
    others: tuple[str, ...] = ()
    """What a pickled file holds beside tensors (`epoch`, `optimizer_states` …)."""


def open_weights(path: Path) -> WeightFile:
    """Open a .safetensors file, or a pickled one (.ckpt, .bin …) with `weights_only=True`.

    Raises ModelError where the file is missing, cut off, damaged or something else. Every offset is checked against
    the file's size before a page is touched.
    """
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    file = open_pickled(path)
    tensors = {key: file.read(key) for key in file.shapes}
    strange = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in NAMES})
    if strange:
        raise ModelError(f"{path} holds tensors of {', '.join(strange)}, which a safetensors file cannot.")
    stored = {key: StoredTensor(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    return WeightFile(path, stored, {}, tensors.__getitem__, file.others)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` → `float16`."""
    return str(dtype).removeprefix("torch.")


def open_safetensors(path: Path) -> WeightFile:
    """`open_weights` of a safetensors file, whatever its name."""
    header, start, size = _header(path)
    metadata: Any = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "its metadata is not a table of strings")
    places = sorted(_places(path, header), key=lambda place: place[1:])
    end = start
    for tensor, begin, stop in places:
        if start + begin != end:
            raise damaged(path, f"{tensor.key} begins at byte {begin}, not where the tensor before it ends")
        end = start + stop
    if end != size:
        raise damaged(path, f"its header tells of {end:,} bytes")
    storage: Any = torch.UntypedStorage.from_file(
        str(path), False, size
    )  # private pages: a write cannot reach the file
    pages = torch.empty(0, dtype=torch.uint8).set_(storage)
    begins = {tensor.key: start + begin for tensor, begin, _ in places}
    tensors = {tensor.key: tensor for tensor, _, _ in places}

    def read(key: str) -> Tensor:
        tensor, begin = tensors[key], begins[key]
        values = pages[begin : begin + tensor.nbytes]
        if begin % tensor.dtype.itemsize:
            values = values.clone()  # a view needs aligned values; safetensors files mostly have them
        return values.view(tensor.dtype).view(tensor.shape)

    return WeightFile(path, tensors, cast("dict[str, str]", metadata), read)


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(the header's table, where the values begin, the file's size)."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            if length <= min(size - 8, MAX_HEADER):
                file.seek(8)
                header: Any = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
                if isinstance(header, dict):
                    return cast("dict[str, Any]", header), 8 + length, size
            refuse_text(path, start)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is not what safetensors writes: {error}") from error
    raise damaged(path, "it is no safetensors file, or is cut off within its header")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _places(path: Path, header: Mapping[str, Any]) -> Iterator[tuple[StoredTensor, int, int]]:
    for key, entry in header.items():
        try:
            shape = tuple(entry["shape"])
            begin, stop = entry["data_offsets"]
            name = entry["dtype"]
        except (TypeError, KeyError, ValueError) as error:
            raise damaged(path, f"its header's entry for {key!r} is incomplete") from error
        if name not in DTYPES:
            raise ModelError(f"{path}: {key} is of the precision {name!r}; known are {', '.join(DTYPES)}.")
        numbers = [*shape, begin, stop]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise damaged(path, f"its header's entry for {key!r} holds what is no whole number from 0 on")
        tensor = StoredTensor(key, DTYPES[name], shape)
        if stop - begin != tensor.nbytes:
            raise damaged(path, f"{key} of {name} {list(shape)} has {stop - begin} bytes")
        yield tensor, begin, stop
