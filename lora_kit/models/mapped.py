"""Weights that lie in a mapped file: how their pages are given back once they were copied.

A safetensors file is mapped, not read: a weight's pages become resident when it is first looked at, and stay so while
any weight of the file lives. Cast or laid out anew, such a weight is held twice. The system takes the file's pages
back when it runs short, but a process that is limited to what it needs is stopped before that.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kit.allocator import pages_of_their_own

_MAPS = Path("/proc/self/maps")


class _Range(NamedTuple):
    start: int
    end: int


@pages_of_their_own()
def rewrite(network: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put `change(weight)` in the place of every parameter, one after the other, and give back the mapped pages of the
    one that it replaces: no more than one is held twice. Parameter objects stay."""
    mapped = _mapped_files()
    for weight in network.parameters():
        old = weight.data
        made = change(old)
        if made is old:
            continue
        weight.data = made
        if old.device.type == "cpu":
            _release(old, mapped)


def cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Every floating-point parameter to `dtype`, as `rewrite` does it."""
    rewrite(network, lambda weight: weight.to(dtype) if weight.is_floating_point() else weight)


def channels_last(network: nn.Module) -> None:
    """Every convolution's weight [out, in, h, w] to channels-last memory, as `rewrite` does it."""
    rewrite(network, lambda weight: weight.to(memory_format=torch.channels_last) if weight.ndim == 4 else weight)


def forget(network: nn.Module) -> None:
    """Give back the mapped pages of weights that nobody looks at for a while: whoever does, has them read from the file
    again. Only for a network whose weights are as the file has them; others' are left alone."""
    mapped = _mapped_files()
    for weight in network.parameters():
        if weight.device.type == "cpu":
            _release(weight.data, mapped)


def _release(tensor: Tensor, mapped: list[_Range]) -> None:
    """Give back the whole pages of a tensor that nobody looks at any more, if it lies in a mapped file."""
    if not mapped or not hasattr(mmap, "MADV_DONTNEED"):
        return
    page = mmap.PAGESIZE
    first = tensor.data_ptr()
    last = first + tensor.numel() * tensor.element_size()
    # Only pages that no other tensor shares: those at the ends may hold parts of its neighbours.
    start, end = -(-first // page) * page, last // page * page
    place = bisect.bisect_right(mapped, _Range(start, 2**64)) - 1
    if place < 0 or end <= start or not (mapped[place].start <= start and end <= mapped[place].end):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_DONTNEED))


def _mapped_files() -> list[_Range]:
    """Where files of weights are mapped in this process, ascending; empty where the system does not tell.

    Only those: the same advice on memory of no file would wipe it out.
    """
    if not _MAPS.exists():
        return []
    found: list[_Range] = []
    for line in _MAPS.read_text().splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5].removesuffix(" (deleted)").endswith((".safetensors", ".ckpt", ".pt", ".pth")):
            start, end = (int(side, 16) for side in parts[0].split("-"))
            found.append(_Range(start, end))
    return sorted(found)
