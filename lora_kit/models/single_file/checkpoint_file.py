"""Opening a single-file checkpoint: names, shapes and metadata without the weights, then one tensor at a time."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_kit.errors import ModelError

PICKLED = (".ckpt", ".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLED)


class CheckpointFile(NamedTuple):
    """An open file. `read` gives one tensor, mapped from disk where the format allows."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    """The safetensors header's strings; empty for a .ckpt."""
    read: Callable[[str], Tensor]
    others: tuple[str, ...] = ()
    """Names of what a .ckpt holds beside its tensors (`epoch`, `optimizer_states` …)."""


@contextmanager
def open_checkpoint(path: Path) -> Generator[CheckpointFile]:
    """Open a .safetensors, .ckpt or .pt file.

    A pickled file is read with `weights_only=True`: it can hold tensors but run no code.
    Raises ModelError where the file is damaged or is something else.
    """
    start = _start(path)
    refuse_text(path, start)
    if path.suffix in PICKLED:
        yield open_pickled(path)
        return
    try:
        handle: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise damaged(path, str(error)) from error
    with handle:
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        yield CheckpointFile(path, shapes, handle.metadata() or {}, handle.get_tensor)


def open_pickled(path: Path) -> CheckpointFile:
    """Open what torch.save wrote. Raises ModelError as `open_checkpoint` does."""
    start = _start(path)
    refuse_text(path, start)
    # torch.save writes a zip archive, or (before 1.6) a pickle of protocol 2.
    if not (zipfile.is_zipfile(path) if start.startswith(b"PK") else start.startswith(b"\x80")):
        raise damaged(path, "it is no archive that torch.save writes")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors, and loading that could run foreign code: refused. Save it as "
            f".safetensors with a tool and from a source you trust. ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise damaged(path, _first_line(error)) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"{path} holds no tensors by name, so it is not a checkpoint.")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names = {str(name) for name in (*loaded, *state) if loaded.get(name) is not state}
    return CheckpointFile(path, shapes, {}, tensors.__getitem__, tuple(sorted(names - tensors.keys())))


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error


def damaged(path: Path, why: str) -> ModelError:
    """The error for a file that is not whole."""
    return ModelError(
        f"{path} is damaged or incomplete ({why}). Download or copy it again and compare its size with the "
        f"source's: it has {path.stat().st_size:,} bytes here."
    )


def refuse_text(path: Path, start: bytes) -> None:
    """Say so where a download gave a web page or a pointer instead of the file."""
    start = start.lstrip(b" \t\r\n\xef\xbb\xbf")
    if start[:1] == b"<":
        raise ModelError(f"{path} is a web page (it begins with {start[:15]!r}), not a checkpoint: download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from.")
    if not start:
        raise ModelError(f"{path} is empty: download it again.")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
