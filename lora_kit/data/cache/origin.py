"""Where a record's picture comes from: its bytes, and a name that changes when they do, as far as a file system can
tell without reading them."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image

from lora_kit.data.pictures import read_picture
from lora_kit.data.records import Record
from lora_kit.data.sources.cells import open_cell
from lora_kit.data.sources.shards import open_span
from lora_kit.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Opener = Callable[[], Image.Image]
_SETTLED_NS = 2_000_000_000
"""File systems count time in steps of up to two seconds (FAT): a younger file could change and keep its time."""


def identity(record: Record) -> str | None:
    """What the bytes of a picture, and of its mask, are known by without reading them: path, size, modification time
    and inode.

    For a row of an HF data set, those of its table and the row; for a member of a tar shard, the shard's and its place.
    None where nothing of that kind is known, where the file is gone, or where it was written in the last two seconds.
    A change that keeps size and modification time is not seen: `lora-kit cache --verify` reads the bytes.
    """
    own = _identity(record.open)
    if record.mask is None:
        return own
    mask = _identity(record.mask)
    return f"{own}\x1dmask\x1d{mask}" if own and mask else None


def digest(content: bytes, mask: bytes | None) -> bytes:
    """What a picture's latents are keyed by: SHA-256 of its bytes, or of the hashes of its bytes and its mask's."""
    own = hashlib.sha256(content).digest()
    return own if mask is None else hashlib.sha256(own + hashlib.sha256(mask).digest()).digest()


def _identity(opener: Opener) -> str | None:
    if not isinstance(opener, partial):
        return None
    opener, arguments = opener.func, opener.args
    if opener is Image.open:
        return _file_identity(Path(arguments[0]))
    if opener is open_cell:
        table, row, _ = arguments
        return _inner_identity(_table_identity(_ById(table)), row)
    if opener is open_span:
        shard, offset, size = arguments
        return _inner_identity(_file_identity(shard), offset, size)
    return None


def read_bytes(record: Record) -> tuple[bytes, bytes | None]:
    """The picture's file, whole, and its mask's. Raises DataError naming the record if one cannot be read."""
    content = _read(record, record.open)
    return content, None if record.mask is None else _read(record, record.mask)


def _read(record: Record, opener: Opener) -> bytes:
    reason = ""
    try:
        if isinstance(opener, partial) and opener.func is Image.open:
            return Path(opener.args[0]).read_bytes()
        with warnings.catch_warnings():  # a bomb is refused where the picture is decoded
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            held = _held_bytes(opener)
        if held is not None:
            return held
        reason = "its picture is no file, so that it has no bytes to know it by. Set data.cache to memory"
    except FileNotFoundError:
        reason = "the file is missing"
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        read_picture(record)  # says it in its own words
        reason = f"not a readable picture ({error})"
    what = "" if opener is record.open else "its mask: "
    raise DataError(f"{record.id}: {what}{reason}")


def _held_bytes(opener: Opener) -> bytes | None:
    """The bytes of the file that Pillow reads the picture from, or None if there is none."""
    with opener() as opened:
        file: Any = getattr(opened, "fp", None)
        if file is None:
            return None
        file.seek(0)
        return file.read()


def _inner_identity(outer: str | None, *place: object) -> str | None:
    return "\x1f".join((outer, *map(str, place))) if outer else None


def _file_identity(path: Path) -> str | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    if time.time_ns() - stat.st_mtime_ns < _SETTLED_NS:
        return None
    return f"{os.path.abspath(path)}\x1f{stat.st_size}\x1f{stat.st_mtime_ns}\x1f{stat.st_ino}"  # noqa: PTH100 (no links)


class _ById:
    """A table as a key of `lru_cache`: the same object, kept alive, so that its id is not used again."""

    def __init__(self, table: Dataset) -> None:
        self.table = table

    def __hash__(self) -> int:
        return id(self.table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.table is self.table


@lru_cache(maxsize=64)
def _table_identity(held: _ById) -> str | None:
    """The files a table lies in, unless it is in memory or only names its pictures' files."""
    table = held.table
    column = table.data.column(0)
    if pa.types.is_struct(column.type):
        cells = [chunk.field("bytes") for chunk in column.chunks]
        embedded = all(cell.null_count == 0 for cell in cells)
    else:
        embedded = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    files = [_file_identity(Path(file["filename"])) for file in table.cache_files]
    if not embedded or not files or None in files:
        return None
    return "\x1e".join(file for file in files if file)
