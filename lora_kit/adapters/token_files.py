"""Embedding files of textual inversion: one token and its vectors, as diffusers and A1111's web UI read them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_kit.adapters.formats.container import write_safetensors
from lora_kit.errors import AdapterFileError
from lora_kit.recipe.base import EMBEDDING_FILES

_NO_NAMES = ("emb_params", "*")
"""Keys that name no token: kohya's and A1111's."""


class Embedding(NamedTuple):
    """A learned token."""

    token: str
    vectors: Tensor
    """fp32 [n, width]."""


def write_embedding(path: Path, embedding: Embedding, metadata: Mapping[str, str]) -> None:
    """One tensor [n, width] under the token's name: diffusers' `load_textual_inversion` takes token and vectors from
    it, A1111 the vectors (there the file's name is the word)."""
    tensors = {embedding.token: embedding.vectors.detach().float().cpu().contiguous()}
    write_safetensors(path, tensors, metadata)


def read_embedding(path: Path, token: str = "") -> Embedding:
    """A `.safetensors` of diffusers, kohya or lora_kit, or a `.pt` / `.bin` of A1111 or diffusers (read with
    weights_only, so that it runs nothing). `token`: what to call it; else the file's own name for it, or the file's
    name.

    Raises AdapterFileError if there is no such file, or it is not one of these.
    """
    name, items = _named(_held(path))
    if len(items) != 1 or not isinstance(items[0][1], Tensor) or items[0][1].ndim not in (1, 2):
        got = ", ".join(str(key) for key, _ in items[:5]) or "no table of tensors"
        raise AdapterFileError(
            f"{path} is no embedding of Stable Diffusion 1 or 2: it holds {got}; allowed: one tensor [width] or "
            "[n, width]. Give the file of one learned token."
        )
    key, vectors = items[0]
    own = name or ("" if key in _NO_NAMES else str(key)) or path.stem
    rows = vectors.detach().float().reshape(-1, vectors.shape[-1])
    if not len(rows) or not bool(torch.isfinite(rows).all()):
        raise AdapterFileError(f"{path}: its vectors {list(vectors.shape)} are none, or hold NaN or infinite values.")
    return Embedding(token or own, rows)


def _named(held: object) -> tuple[str, list[tuple[str, Any]]]:
    """The name that A1111 writes beside the vectors, and what lies under which key."""
    if not isinstance(held, Mapping):
        return "", []
    table = cast("Mapping[str, Any]", held)
    if "string_to_param" not in table:
        return "", list(table.items())
    inner = table["string_to_param"]
    items = list(cast("Mapping[str, Any]", inner).items()) if isinstance(inner, Mapping) else []
    return str(table.get("name") or ""), items


def _held(path: Path) -> Any:
    """What is in the file."""
    if not path.is_file():
        raise AdapterFileError(f"{path}: there is no such file; looked for {path.absolute()}")
    if path.suffix.lower() not in EMBEDDING_FILES:
        kind = path.suffix or "nameless"
        raise AdapterFileError(f"{path}: got a {kind} file; an embedding is {', '.join(EMBEDDING_FILES)}")
    try:
        return load_file(path) if path.suffix.lower() == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, ValueError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        said = " ".join(str(error).split())[:200]
        raise AdapterFileError(f"{path} cannot be read as an embedding: {said}") from error
