"""Memory that was freed and that the C library's allocator still holds, given back to the system."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import cache
from typing import Any


def give_back_freed(*, collect: bool = True) -> None:
    """Give it back, after a stage of a run whose tensors were of other sizes than the next one's. collect: first free
    what only reference cycles hold, which takes a tenth of a second.

    glibc keeps what lies between blocks that are in use for blocks to come (mallopt(3), malloc_trim(3)), which then
    stays resident beside those that do not fit in. Takes milliseconds. Other C libraries are left alone.
    """
    trim = _malloc_trim()
    if trim is not None:
        if collect:
            gc.collect()
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # no glibc; on Windows there is no such library
        return None
