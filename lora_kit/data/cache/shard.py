"""One shard: an immutable safetensors file of many entries, which says itself whether it is whole.

Its name is the hash of its header, and the header holds a checksum of every entry; so a damaged header shows
at once, and a damaged entry when it is read. An entry is one or more tensors of one dtype, `KEY.name` in the file,
which lie side by side.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from lora_kit.data.cache.keys import KEY_BYTES
from lora_kit.errors import DataError
from lora_kit.files import write_atomically

SHARD_NAME = re.compile(r"[0-9a-f]{40}\.safetensors")
CHECKSUM_BYTES = 16
_METADATA = "lora_kit_cache"
_MAX_HEADER = 1 << 28
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Tensors = Mapping[str, Tensor]


class DamagedError(DataError):
    """A shard or an entry is not what was written."""


class Part(NamedTuple):
    """One tensor of an entry."""

    name: str
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * _DTYPES[self.dtype].itemsize


class Entry(NamedTuple):
    """Where an entry lies in a shard."""

    key: bytes
    begin: int
    """Byte in the file."""
    checksum: bytes
    layout: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.size for part in self.layout)


def write_shard(folder: Path, entries: Mapping[bytes, Tensors]) -> Path:
    """Write a new shard of these entries, by key.

    Its header holds a random word, so that no two shards have one name: not those of two processes, and not that of
    a damaged entry and of the one made anew. Memory: the entries' bytes twice more. Raises OSError if the disk refuses.
    """
    named: dict[str, Tensor] = {}
    checksums: dict[str, str] = {}
    for key, tensors in entries.items():
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        named |= {f"{key.hex()}.{name}": tensor for name, tensor in held.items()}
        data = b"".join(_bytes(tensor) for tensor in held.values())
        checksums[key.hex()] = _checksum(key, _layout(held), data).hex()
    content = save(named, {_METADATA: json.dumps({"nonce": secrets.token_hex(8), "checksums": checksums})})
    path = folder / _name(content[: 8 + int.from_bytes(content[:8], "little")])
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return path


def read_shard(path: Path) -> list[Entry]:
    """The entries of a shard; reads its header alone, about 300 bytes an entry.

    Raises DamagedError if the header is not what was written, or the file is shorter or longer than it says.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = start + file.read(length) if length <= min(size, _MAX_HEADER) else start
    if path.name != _name(header):
        raise DamagedError(f"{path}: its header is not what was written")
    tensors: dict[str, Any] = json.loads(header[8:])
    checksums: dict[str, str] = json.loads(tensors.pop("__metadata__")[_METADATA])["checksums"]
    entries = _entries(tensors, checksums, len(header))
    expected = len(header) + sum(entry.size for entry in entries)
    if size != expected:
        raise DamagedError(f"{path}: is {size} bytes long, not the {expected} that were written")
    return entries


def read_entry(path: Path, entry: Entry) -> dict[str, Tensor]:
    """An entry's tensors, copied out of the mapped file once their checksum is right.

    Maps the entry's bytes alone and only while reading: resident memory stays flat, nothing is held open, and
    workers share the system's page cache. The checksum is that of every read: 0.1 ms for 512 px in fp32.

    Raises DamagedError, or FileNotFoundError if the shard is gone.
    """
    try:
        mapped = np.memmap(path, np.uint8, "r", entry.begin, (entry.size,))
    except ValueError as error:  # the file ends before the entry does
        raise DamagedError(f"{path}: entry {entry.key.hex()} is cut off") from error
    if _checksum(entry.key, entry.layout, mapped) != entry.checksum:
        raise DamagedError(f"{path}: entry {entry.key.hex()} is not what was written")
    data = torch.from_numpy(np.array(mapped))
    tensors: dict[str, Tensor] = {}
    begin = 0
    for part in entry.layout:
        raw = data[begin : begin + part.size]
        tensors[part.name] = raw.view(_DTYPES[part.dtype]).reshape(part.shape)
        begin += part.size
    return tensors


def _entries(tensors: dict[str, Any], checksums: dict[str, str], data_begin: int) -> list[Entry]:
    """The header's tensors, put together by key."""
    found: defaultdict[str, list[tuple[int, Part]]] = defaultdict(list)
    for name, facts in tensors.items():
        key, _, part = name.partition(".")
        found[key].append((facts["data_offsets"][0], Part(part, facts["dtype"], tuple(facts["shape"]))))
    entries: list[Entry] = []
    for key, parts in found.items():
        parts.sort()
        layout = tuple(part for _, part in parts)
        entries.append(Entry(bytes.fromhex(key), data_begin + parts[0][0], bytes.fromhex(checksums[key]), layout))
    return entries


def _layout(tensors: Tensors) -> tuple[Part, ...]:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    assert len(dtypes) == 1 and dtypes <= _NAMES.keys(), f"an entry has one dtype of {list(_NAMES)}, got {dtypes}"
    return tuple(Part(name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items())


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _checksum(key: bytes, layout: tuple[Part, ...], data: Any) -> bytes:
    assert len(key) == KEY_BYTES
    digest = hashlib.sha256(key)  # twice as fast as blake2b where the processor knows it
    digest.update(repr([tuple(part) for part in layout]).encode())
    digest.update(data)
    return digest.digest()[:CHECKSUM_BYTES]


def _name(header: bytes) -> str:
    return f"{hashlib.sha256(header).hexdigest()[:40]}.safetensors"
