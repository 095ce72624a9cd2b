"""A component's weight files in a diffusers folder: safetensors or .bin, whole or sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

from lora_kit.errors import ModelError

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


class ComponentFiles(NamedTuple):
    """Where a component's weights lie."""

    folder: Path
    weights: tuple[Path, ...]
    """The file or shards that are read."""
    shard_index: Path | None
    """The JSON that says which shard holds which tensor."""
    all_weights: tuple[Path, ...]
    """Every weight file and index of the component: other variants and formats too."""
    variant: str | None
    """`fp16`, if only such a variant is there."""


def component_files(folder: Path) -> ComponentFiles:
    """Find a component's weights as diffusers would: no variant before a variant, safetensors before .bin.

    Raises ModelError if there are none, or only several variants.
    """
    files = sorted(path for path in folder.iterdir() if path.name.startswith(_STEMS) and _is_weights(path))
    heads = [path for path in files if "-of-" not in path.name]
    plain = [path for path in heads if _variant(path) is None]
    variants = sorted({_variant(path) or "" for path in heads})
    if not heads or (not plain and len(variants) > 1):
        got = f"only the variants {', '.join(variants)}" if heads else "no weights"
        raise ModelError(
            f"{folder}: found {got}; expected {_STEMS[0]}.safetensors or model.safetensors (or .bin, or shards)"
        )
    candidates = plain or heads
    head = min(candidates, key=lambda path: (".safetensors" not in path.name, path.name.endswith(".json"), path.name))
    index = head if head.suffix == ".json" else None
    return ComponentFiles(folder, _shards(index) if index else (head,), index, tuple(files), _variant(head))


def written_name(name: str) -> str:
    """The name that a weight file or index has after a merge: a .bin is written as safetensors, all else stays.

    `pytorch_model.bin` → `model.safetensors`, `pytorch_model.bin.index.json` → `model.safetensors.index.json`.
    """
    if ".bin" not in name:
        return name
    return name.replace("pytorch_model", "model", 0 if name.startswith("diffusion_") else 1).replace(
        ".bin", ".safetensors"
    )


def written_index(files: ComponentFiles, total_size: int) -> str | None:
    """The index of the written shards, or None where the component is one file. `total_size`: bytes of all values."""
    if files.shard_index is None:
        return None
    index = _read_index(files.shard_index)
    index["metadata"] = {**index.get("metadata", {}), "total_size": total_size}
    index["weight_map"] = {key: written_name(name) for key, name in index["weight_map"].items()}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _is_weights(path: Path) -> bool:
    return path.name.endswith((".safetensors", ".bin", ".index.json")) or ".index." in path.name


def _variant(path: Path) -> str | None:
    """`diffusion_pytorch_model.fp16.safetensors` → `fp16`."""
    known = {"safetensors", "bin", "index", "json"}
    middle = [part for part in path.name.split(".")[1:] if part not in known]
    return middle[0] if middle else None


def _shards(index: Path) -> tuple[Path, ...]:
    names = sorted(set(_read_index(index)["weight_map"].values()))
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if missing:
        raise ModelError(f"{index}: names shards that are not there: {', '.join(missing)}")
    return tuple(index.parent / name for name in names)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
        names: Any = index["weight_map"].values()
        if not all(isinstance(name, str) for name in names) or not isinstance(index.get("metadata", {}), dict):
            raise TypeError("a name in it is not text")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is no index of shards ({error}). Fetch it again.") from error
    return cast("dict[str, Any]", index)
