"""Write a changed copy of a weight file, tensor by tensor from its mapped pages."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kit.errors import RecipeError
from lora_kit.merging.fuse import Part, blocks, delta, matrix, working_dtype
from lora_kit.merging.stored import NAMES, StoredTensor, WeightFile

MAX_THREADS = 4
"""More only queue for the memory bus."""
RUN = 1 << 24
"""Bytes of unchanged tensors that one job copies."""
FLUSH_EVERY_S = 0.1

_seeking = threading.Lock()


class Rewrite(NamedTuple):
    """What becomes of a weight file."""

    source: WeightFile
    parts: Mapping[str, Sequence[Part]]
    """Key → what is added to which of its rows; keys that are not here keep their values."""
    dtypes: Mapping[str, torch.dtype]
    """Key → the precision it is written in, where that is not its own."""
    metadata: Mapping[str, str]

    def dtype_of(self, tensor: StoredTensor) -> torch.dtype:
        """The precision a tensor is written in."""
        return self.dtypes.get(tensor.key, tensor.dtype)


Offsets = dict[str, int]


def layout(rewrite: Rewrite) -> tuple[bytes, Offsets, int]:
    """(the new file's header, key → where its values begin, the file's size).

    The source's order where no precision changes; else wide precisions first, so that all stay aligned.
    """
    tensors = list(rewrite.source.tensors.values())
    if any(rewrite.dtype_of(tensor) != tensor.dtype for tensor in tensors):
        tensors.sort(key=lambda tensor: (-rewrite.dtype_of(tensor).itemsize, tensor.key))
    header: dict[str, object] = {"__metadata__": dict(rewrite.metadata)} if rewrite.metadata else {}
    offsets: Offsets = {}
    end = 0
    for tensor in tensors:
        dtype, begin = rewrite.dtype_of(tensor), end
        end += tensor.nbytes // tensor.dtype.itemsize * dtype.itemsize
        header[tensor.key] = {"dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        offsets[tensor.key] = begin
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {key: start + begin for key, begin in offsets.items()}, start + end


def write_rewrite(rewrite: Rewrite, path: Path) -> None:
    """Write the new file to `path`, which nobody may be reading yet.

    Its space is claimed first, so that a full disk is found before any work. Raises RecipeError if there is none, and
    ModelError as `fuse.blocks` does.
    """
    header, offsets, size = layout(rewrite)
    with path.open("wb") as file, flushing(file.fileno()):
        handle = file.fileno()
        _claim(path, handle, size)
        _write(handle, torch.frombuffer(bytearray(header), dtype=torch.uint8), 0)
        _run(_jobs(rewrite, handle, offsets))


def _claim(path: Path, handle: int, size: int) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:
            os.ftruncate(handle, size)
    except OSError as error:
        raise RecipeError(
            f"{path.parent}: there is no room for the merged file of {size:,} bytes ({error.strerror}). Free some, or "
            "write to another disk. Nothing was left behind."
        ) from error


def _jobs(rewrite: Rewrite, handle: int, offsets: Offsets) -> list[Callable[[], None]]:
    """One job for each changed tensor, and one for each run of unchanged ones."""
    jobs: list[Callable[[], None]] = []
    run: list[str] = []
    size = 0
    for key in sorted(offsets, key=lambda key: offsets[key]):
        tensor = rewrite.source.tensors[key]
        if key in rewrite.parts or rewrite.dtype_of(tensor) != tensor.dtype:
            jobs.append(lambda key=key: _change(rewrite, key, handle, offsets[key]))
            continue
        run.append(key)
        size += tensor.nbytes
        if size >= RUN:
            jobs.append(lambda run=run: _copy(rewrite.source, run, handle, offsets))
            run, size = [], 0
    return [*jobs, lambda: _copy(rewrite.source, run, handle, offsets)]


def _copy(source: WeightFile, keys: Sequence[str], handle: int, offsets: Offsets) -> None:
    for key in keys:
        _write(handle, source.read(key), offsets[key])


def _change(rewrite: Rewrite, key: str, handle: int, offset: int) -> None:
    base = matrix(rewrite.source.read(key).contiguous())
    dtype = rewrite.dtype_of(rewrite.source.tensors[key])
    row = dtype.itemsize * base.shape[1]
    end = 0
    for part in sorted(rewrite.parts.get(key, ()), key=lambda part: part.start):
        _stream(base[end : part.start], None, dtype, key, (handle, offset + end * row))
        _stream(base[part.start : part.stop], part, dtype, key, (handle, offset + part.start * row))
        end = part.stop
    _stream(base[end:], None, dtype, key, (handle, offset + end * row))


def _stream(rows: Tensor, part: Part | None, dtype: torch.dtype, key: str, place: tuple[int, int]) -> None:
    handle, offset = place
    added = delta(part, rows, working_dtype(rows.dtype))
    for start, values in blocks(rows, added, dtype, key):
        _write(handle, values, offset + start * rows.shape[1] * dtype.itemsize)


def _write(handle: int, tensor: Tensor, offset: int) -> None:
    if not tensor.numel():
        return
    values: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    view = memoryview(values)
    while view:
        written = _write_at(handle, view, offset)
        view, offset = view[written:], offset + written


def _write_at(handle: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(handle, view, offset)
    with _seeking:  # Windows has no pwrite
        os.lseek(handle, offset, os.SEEK_SET)
        return os.write(handle, view)


def _run(jobs: Sequence[Callable[[], None]]) -> None:
    """Do the jobs side by side, in order; the first error stops those that have not begun."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(_threads(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for done in [pool.submit(job) for job in jobs]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _threads() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, available)


@contextmanager
def flushing(handle: int) -> Generator[None]:
    """Send what is written to the disk while more is computed, so that the last fsync has little left to wait for."""
    done = threading.Event()
    errors: list[OSError] = []

    def flush() -> None:
        try:
            while not done.wait(FLUSH_EVERY_S):
                os.fsync(handle)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    for error in errors:  # the kernel tells of a failed write once, so the last fsync may know nothing of it
        raise error
