"""The safetensors container: read with clear errors, written with the same bytes for the same content.

The safetensors library orders header metadata by a hash map in some releases, so that two writes of one adapter
differ. A resumed run is compared by its file's hash, therefore the header is laid out here.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters.formats.container_header import (
    DTYPES,
    MAX_HEADER,
    Damaged,
    Entry,
    Header,
    Unsupported,
    parse_header,
)
from lora_kit.errors import AdapterFileError
from lora_kit.files import write_atomically

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")


class Contents(NamedTuple):
    """What a safetensors file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Container:
    """An open file whose header is checked; no tensor is read yet."""

    path: Path
    header: Header
    _file: FileIO
    _offset: int

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, on the CPU, as stored, in memory of their own. Raises AdapterFileError as they are read."""
        before = os.fstat(self._file.fileno())
        found = {entry.name: self._tensor(entry) for entry in self.header.entries}
        after = os.fstat(self._file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise self._changed()
        return found

    def _tensor(self, entry: Entry) -> Tensor:
        # Read, not mapped: a mapped file that another process cuts off ends this one (SIGBUS).
        raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        view = raw.numpy().data
        self._file.seek(self._offset + entry.start)
        while len(view):
            count = self._file.readinto(view)
            if not count:
                raise self._changed()
            view = view[count:]
        # A bool is 0 or 1 in memory; a file can hold any byte.
        return (raw != 0 if entry.dtype == torch.bool else raw.view(entry.dtype)).reshape(entry.shape)

    def _changed(self) -> AdapterFileError:
        return AdapterFileError(f"{self.path}: was changed while it was being read. Try again once it is complete.")


@contextmanager
def open_safetensors(path: Path) -> Generator[Container]:
    """Open a file and check its whole header, so that its keys can be judged before its data is read.

    Raises AdapterFileError if it is missing, no regular file, cut off, or not safetensors.
    """
    with _open(path) as file:
        header, offset = _header(path, file)
        yield Container(path, header, file, offset)


def read_safetensors(path: Path) -> Contents:
    """All tensors (CPU, as stored, in memory of their own) and the header's metadata.

    Raises AdapterFileError as `open_safetensors` does, and if the file changes meanwhile.
    """
    with open_safetensors(path) as file:
        return Contents(file.tensors(), file.header.metadata)


def _open(path: Path) -> FileIO:
    """A a regular file. Opening a named pipe or a device does not wait for it, and is refused."""
    try:
        # O_NONBLOCK: a pipe without a writer would block for ever. O_BINARY exists on Windows alone.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise AdapterFileError(f"{path}: no such file. An adapter is one .safetensors file.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise AdapterFileError(f"{path}: cannot be opened ({error}).") from error
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return FileIO(handle, "rb")
    os.close(handle)
    what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise AdapterFileError(f"{path}: {what}. An adapter is one .safetensors file.")


def _header(path: Path, file: FileIO) -> tuple[Header, int]:
    """The checked header, and where the data begins."""
    size, start = os.fstat(file.fileno()).st_size, file.read(64)
    length = int.from_bytes(start[:8], "little")
    if other := _other_kind(start):
        raise AdapterFileError(f"{path}: {other}.")
    if size < 8 or 8 + length > size:
        said = f", its header alone should take {length}" if size >= 8 else ""
        raise AdapterFileError(f"{path}: is cut off or damaged: it has {size} bytes{said}. Copy it again.")
    if length > MAX_HEADER:
        raise AdapterFileError(f"{path}: its header takes {length} bytes; allowed: {MAX_HEADER}. It is no adapter.")
    file.seek(8)
    try:
        return parse_header(file.read(length), size - 8 - length), 8 + length
    except Unsupported as error:
        raise AdapterFileError(f"{path}: {error}.") from error
    except Damaged as error:
        raise AdapterFileError(f"{path}: is cut off or damaged, or no adapter: {error}.") from error


def _other_kind(start: bytes) -> str | None:
    """What a file that begins so is, if it is one that users often take for safetensors."""
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself. Run `git lfs pull`"
    # A header of 640 bytes has a length that begins like a pickle; but then the header follows.
    if start.startswith(_PICKLES) and start[4:9] != b"\0\0\0\0{":
        return "is a pickled PyTorch file, not safetensors. Convert it to safetensors first"
    # A header of 2⁴⁰ bytes and more: where its length should stand there is text.
    if start.lstrip().startswith((b"<", b"{")) and start[5:8] != b"\0\0\0":
        return "is text, not safetensors (a saved web page or JSON). Download it again"
    return None


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
