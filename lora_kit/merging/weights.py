"""A component's weight files in a diffusers folder: safetensors or .bin, whole or sharded."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_kit.errors import ModelError

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


class ComponentFiles(NamedTuple):
    """Where a component's weights lie."""

    folder: Path
    weights: tuple[Path, ...]
    """The file or shards that are read."""
    all_weights: tuple[Path, ...]
    """Every weight file and index of the component: other variants and formats too."""
    variant: str | None
    """`fp16`, if only such a variant is there."""

    @property
    def merged_name(self) -> str:
        """The one safetensors file that replaces them."""
        stem = "diffusion_pytorch_model" if self.weights[0].name.startswith(_STEMS[0]) else "model"
        return f"{stem}.{self.variant}.safetensors" if self.variant else f"{stem}.safetensors"


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
    return ComponentFiles(folder, _shards(head), tuple(files), _variant(head))


def _is_weights(path: Path) -> bool:
    return path.name.endswith((".safetensors", ".bin", ".index.json")) or ".index." in path.name


def _variant(path: Path) -> str | None:
    """`diffusion_pytorch_model.fp16.safetensors` → `fp16`."""
    known = {"safetensors", "bin", "index", "json"}
    middle = [part for part in path.name.split(".")[1:] if part not in known]
    return middle[0] if middle else None


def _shards(head: Path) -> tuple[Path, ...]:
    if head.suffix != ".json":
        return (head,)
    names = sorted(set(json.loads(head.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (head.parent / name).is_file()]
    if missing:
        raise ModelError(f"{head}: names shards that are not there: {', '.join(missing)}")
    return tuple(head.parent / name for name in names)


def read_weights(files: ComponentFiles) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors as stored (mapped from disk) and the first file's header metadata.

    Raises ModelError if a file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in files.weights:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    metadata = metadata or dict(file.metadata() or {})
                    tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            else:
                tensors |= _tensors_of(torch.load(path, map_location="cpu", weights_only=True))
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise ModelError(f"{path}: the weights are cut off or damaged ({error})") from error
    return tensors, metadata


def _tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
