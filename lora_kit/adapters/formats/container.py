"""The safetensors container: read with clear errors, written with the same bytes for the same content.

The safetensors library orders header metadata by a hash map in some releases, so that two writes of one adapter
differ. A resumed run is compared by its file's hash, therefore the header is laid out here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_kit.errors import AdapterFileError
from lora_kit.files import write_atomically

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Contents(NamedTuple):
    """What a safetensors file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> Contents:
    """All tensors (CPU, as stored) and the header's metadata.

    Raises AdapterFileError if the file is missing, cut off, or not safetensors.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise AdapterFileError(f"{path}: {what}. An adapter is one .safetensors file.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
            return Contents(tensors, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise AdapterFileError(f"{path}: {_diagnosis(path)} ({error}).") from error


def _diagnosis(path: Path) -> str:
    """Why the safetensors library cannot read this file, in the user's words."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself. Run `git lfs pull`"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "is a pickled PyTorch file, not safetensors. Convert it to safetensors first"
    if start.lstrip().startswith((b"<", b"{")):
        return "is text, not safetensors (a saved web page or JSON). Download it again"
    header = int.from_bytes(start[:8], "little")
    if size < 8 or 8 + header > size or start[8:9] == b"{":
        return f"is cut off or damaged: it has {size} bytes, fewer or more than its header says. Copy it again"
    return "is not a safetensors file"


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file's bytes: u64 header length, JSON header padded to 8 bytes, data. Wide dtypes first, then by name.

    Raises AdapterFileError for a dtype the layout does not know.
    """
    return b"".join([_head(tensors, metadata), *map(_data, _ordered(tensors))])


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`serialise` to a file, atomically and tensor by tensor: needs no second copy of a large network."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(_head(tensors, metadata))
            for tensor in _ordered(tensors):
                file.write(_data(tensor))

    write_atomically(path, write)


def _names(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _ordered(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    return (tensors[name] for name in _names(tensors))


def _data(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _head(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    unknown = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in _DTYPE_NAMES})
    if unknown:
        raise AdapterFileError(f"cannot write tensors of dtype {', '.join(unknown)} to a safetensors file")
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in _names(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def data_hash(data: bytes) -> str:
    """Sha256 (hex) of the bytes after the header: independent of metadata. `sshs_model_hash` of sd-scripts."""
    start = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(memoryview(data)[start:]).hexdigest()


def legacy_hash(data: bytes) -> str:
    """`sshs_legacy_hash` of sd-scripts: 8 hex digits of the sha256 of bytes 0x100000 to 0x110000."""
    return hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
