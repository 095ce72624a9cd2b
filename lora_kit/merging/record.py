"""What a merged file's header says of the adapters in it, and what an un-merge reads there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from lora_kit.adapters.state import AdapterState
from lora_kit.errors import RecipeError

MERGED = "lora_kit.merged"
"""Header key: JSON list of the adapters in the weights, in the order they went in."""
UNMERGED = "lora_kit.unmerged"
"""Header key: JSON list of the adapters that were taken out again; what is left of them is rounding."""

Record = dict[str, Any]


def record_of(source: AdapterState | Path, scale: float, specs: Sequence[str]) -> Record:
    """One adapter: file name, sha256 of its bytes, scale, the scales per module, and this program's version."""
    record: Record = {"scale": scale, "version": _version()}
    if specs:
        record["scales"] = list(specs)
    if isinstance(source, AdapterState):
        return {**record, "sshs_model_hash": source.metadata.get("sshs_model_hash", "")}
    path = source / "adapter_model.safetensors" if source.is_dir() else source
    with path.open("rb") as file:
        return {**record, "file": source.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def merged_metadata(before: Mapping[str, str], records: Sequence[Record]) -> dict[str, str]:
    """The header's strings after a merge: all that was there, and the new records after those of earlier merges."""
    return {"format": "pt", **before, MERGED: json.dumps([*read_records(before), *records], sort_keys=True)}


def unmerged_metadata(before: Mapping[str, str], records: Sequence[Record]) -> dict[str, str]:
    """The header's strings after an un-merge: each record is taken from the merged ones, if it is among them."""
    left = read_records(before)
    for record in records:
        found = next((one for one in reversed(left) if _same(one, record)), None)
        if found is not None:
            left.remove(found)
    gone = [*read_records(before, UNMERGED), *records]
    kept = {key: value for key, value in before.items() if key != MERGED}
    merged = {MERGED: json.dumps(left, sort_keys=True)} if left else {}
    return {"format": "pt", **kept, **merged, UNMERGED: json.dumps(gone, sort_keys=True)}


def check_unmerge(path: Path, metadata: Mapping[str, str], records: Sequence[Record]) -> list[str]:
    """Warnings for adapters that `path` does not say it holds.

    Raises RecipeError for one that went in at another strength: subtracting this one would not give the base back.
    """
    held = read_records(metadata)
    notes: list[str] = []
    for record in records:
        name = record.get("file", "the adapter")
        if any(_same(one, record) for one in held):
            continue
        alike = [one for one in held if _identity(one) == _identity(record)]
        if alike:
            raise RecipeError(
                f"{path}: {name} was merged at {_strengths(alike)}, so taking it out at {_strengths([record])} would "
                "not give the base back. Name that scale (FILE:SCALE, --scale), or merge at a negative scale if this "
                "is what you want."
            )
        notes.append(f"{path.name}: its header does not say that {name} is in it; subtracted all the same")
    return notes


def read_records(metadata: Mapping[str, str], key: str = MERGED) -> list[Record]:
    """The header's list; empty if there is none, or if it is not ours."""
    try:
        found: Any = json.loads(metadata.get(key, "[]"))
    except ValueError:
        return []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in cast("list[object]", found)):
        return []
    return cast("list[Record]", found)


def _identity(record: Record) -> object:
    return record.get("sha256") or record.get("sshs_model_hash") or record.get("file")


def _same(one: Record, other: Record) -> bool:
    keys = ("scale", "scales")
    return _identity(one) == _identity(other) and all(one.get(key) == other.get(key) for key in keys)


def _strengths(records: Sequence[Record]) -> str:
    return " and ".join(
        f"{record.get('scale', 1):g}{' with ' + ', '.join(record['scales']) if record.get('scales') else ''}"
        for record in records
    )


def _version() -> str:
    try:
        return version("lora_kit")
    except PackageNotFoundError:
        return "unknown"
