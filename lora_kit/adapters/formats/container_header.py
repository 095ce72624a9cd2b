"""The header of a safetensors file, checked to the last byte before anything is allocated.

The safetensors library refuses most damaged headers too, but keeps the last of two equal keys, says where but not
what is wrong, and maps the file, so that one that is cut off meanwhile kills the process (SIGBUS). A file from a hub
is a stranger's: here it costs bounded time and memory, and one clear sentence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple, NoReturn, cast

import torch

MAX_HEADER = 16 << 20
"""Bytes. The largest seen hold some MB of tag statistics; parsing costs about ten times as much memory."""
MAX_TENSORS = 1 << 16
"""The largest adapters (LoKr of every layer) hold some thousand tensors."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_OTHER_DTYPES = {"F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "C64", "U16", "U32", "U64"}
_MAX_NAME = 512
_MAX_DIMENSIONS = 8
_MAX_MARKS = 24 * MAX_TENSORS  # one tensor's entry has about 14 of `{}[],:`
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SHOWN = 60
_LISTED = 5


class Damaged(Exception):  # noqa: N818 - caught where the path is known, never seen outside
    """What is wrong with the header; the caller knows the path."""


class Unsupported(Damaged):
    """The file is sound, but holds what lora_kit does not read."""


class Entry(NamedTuple):
    """One tensor in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset in the data, bytes."""
    end: int


class Header(NamedTuple):
    """A checked header."""

    entries: tuple[Entry, ...]
    """In the order of their data, which they fill without a gap."""
    metadata: dict[str, str]


def parse_header(text: bytes, data_size: int) -> Header:
    """The header's JSON against the `data_size` bytes that follow it.

    Raises Damaged with what is wrong.
    """
    document = _document(text)
    metadata = _metadata(document.pop("__metadata__", {}))
    if len(document) > MAX_TENSORS:
        raise Damaged(f"its header lists {len(document)} tensors; allowed: {MAX_TENSORS}")
    _check_names([*document, *metadata, *metadata.values()], document)
    _check_dtypes(document)
    entries = sorted((_entry(name, facts) for name, facts in document.items()), key=lambda entry: entry[3:])
    _check_layout(entries, data_size)
    return Header(tuple(entries), metadata)


def _document(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise Damaged("its header does not begin with {, so it is no safetensors file")
    _check_depth(_STRING.sub(b'""', text))
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Damaged(f"its header is not UTF-8 (byte {error.start})") from error
    except ValueError as error:  # JSONDecodeError, and integers of more digits than Python converts
        raise Damaged(f"its header is not JSON ({error})") from error


def _check_depth(skeleton: bytes) -> None:
    """Bound what parsing can cost: the header without its strings is shallow and short."""
    if sum(skeleton.count(mark) for mark in (b"{", b"}", b"[", b"]", b",", b":")) > _MAX_MARKS:
        raise Damaged(f"its header lists more than {MAX_TENSORS} tensors")
    depth = 0
    for bracket in re.finditer(rb"[][{}]", skeleton):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > 3:
            raise Damaged("its header is nested deeper than a safetensors header is")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = [key for key, _ in pairs if key in seen or seen.add(key)]
        raise Damaged(f"its header has the key {_quoted(twice[0])} twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise Damaged(f"its header holds {name}, which is not JSON")


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise Damaged("the header's __metadata__ is not an object of strings")
    metadata = cast("dict[str, Any]", value)
    others = [key for key, text in metadata.items() if not isinstance(text, str)]
    if others:
        raise Damaged(f"the header's __metadata__ has values that are not strings: {_listed(others)}")
    return cast("dict[str, str]", metadata)


def _check_names(texts: Iterable[str], names: Collection[str]) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Damaged("its header holds half a surrogate pair, which is no character") from error
    long = [name for name in names if len(name) > _MAX_NAME]
    if long:
        raise Damaged(f"it has tensor names of more than {_MAX_NAME} characters: {_listed(long)}")
    hidden = [name for name in names if not name.isprintable() or not name]
    if hidden:
        raise Damaged(f"it has tensor names that are empty or hold control characters: {_listed(hidden)}")


def _check_dtypes(document: Mapping[str, Any]) -> None:
    """Told apart from damage: the file is sound, lora_kit just does not compute in such numbers."""
    said = {str(cast("Any", facts).get("dtype")) for facts in document.values() if isinstance(facts, dict)}
    if found := sorted(said & _OTHER_DTYPES):
        raise Unsupported(
            f"holds tensors of dtype {', '.join(found)}, which lora_kit does not read; "
            f"allowed: {', '.join(DTYPES)}. Save it as F16 with the tool that made it"
        )


def _entry(name: str, facts: Any) -> Entry:
    where = f"tensor {_quoted(name)}"
    if not isinstance(facts, dict) or cast("Any", facts).keys() != {"dtype", "shape", "data_offsets"}:
        raise Damaged(f"{where}: its entry must have dtype, shape and data_offsets, and nothing else")
    dtype = DTYPES.get(facts["dtype"]) if isinstance(facts["dtype"], str) else None
    if dtype is None:
        raise Damaged(f"{where}: unknown dtype {_quoted(str(cast('Any', facts['dtype'])))}; known: {', '.join(DTYPES)}")
    shape, offsets = _counts(facts["shape"]), _counts(facts["data_offsets"])
    if shape is None or len(shape) > _MAX_DIMENSIONS:
        raise Damaged(f"{where}: its shape must be a list of at most {_MAX_DIMENSIONS} whole numbers from 0 on")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Damaged(f"{where}: its data_offsets must be two whole numbers from 0 on, in order")
    if 0 in shape:
        raise Damaged(f"{where}: its shape {list(shape)} has no elements")
    needed = math.prod(shape) * dtype.itemsize
    if needed != offsets[1] - offsets[0]:
        raise Damaged(
            f"{where}: {_shape(shape)} of {facts['dtype']} takes {_size(needed)}, "
            f"its data_offsets say {_size(offsets[1] - offsets[0])}"
        )
    return Entry(name, dtype, shape, *offsets)


def _counts(value: Any) -> tuple[int, ...] | None:
    """A list of whole numbers from 0 on that fit 63 bits, or None. JSON's true is Python's 1, hence the type."""
    if not isinstance(value, list):
        return None
    numbers = cast("list[Any]", value)
    return tuple(numbers) if all(type(one) is int and 0 <= one < 1 << 63 for one in numbers) else None


def _check_layout(entries: list[Entry], data_size: int) -> None:
    """The data must be filled without gap or overlap: what no tensor owns could hide anything."""
    expected = 0
    for entry in entries:
        where = f"tensor {_quoted(entry.name)}"
        if entry.end > data_size:
            raise Damaged(f"{where}: ends at byte {entry.end} of the data, which has {data_size}: the file is cut off")
        if entry.start != expected:
            what = "overlaps the one before it" if entry.start < expected else "leaves a gap before it"
            raise Damaged(f"{where}: {what} (begins at byte {entry.start}, the one before ends at {expected})")
        expected = entry.end
    if expected != data_size:
        raise Damaged(f"{data_size - expected} bytes at its end belong to no tensor")


def _quoted(text: str) -> str:
    return ascii(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(_quoted(name) for name in islice(names, _LISTED)) + more


def _shape(shape: tuple[int, ...]) -> str:
    return f"shape {list(shape)}" if len(str(shape)) <= _SHOWN else f"a shape of {len(shape)} dimensions"


def _size(count: int) -> str:
    return f"{count} bytes" if count < 1 << 63 else "more than 2⁶³ bytes"
