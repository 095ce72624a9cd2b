"""How this process gets memory from the system: what a step frees is kept for the next tensor of its size, and what
lasts lies apart from that.

glibc maps every block above 32 MiB (M_MMAP_THRESHOLD's dynamic limit, mallopt(3)) and unmaps it when it is freed. A
training step on a CPU makes many such blocks and drops them at once: a convolution of 2560 channels copies its 56 MiB
of bf16 weight into oneDNN's layout in every call, and each time the kernel has to zero fresh pages
(docs/benchmarks/step.md).

Kept in one heap with them, weights would stand between gaps: those of what they were cast or quantised from. Every
block looks for the gap that fits it best, so that steps come to use nearly all of them, and all stay resident
(docs/benchmarks/memory.md).

Each thread also holds back up to seven freed blocks of each small size for itself (glibc's tcache). torch asks for
aligned memory, and glibc cuts off what a block has too much at its end. Those ends are small: held back, handed out and
held back again, they are never joined to the block that they were cut from, which is then too short for the next tensor
of its own size. So commands run with one held back instead of seven. Only a process's environment can tell glibc that
(GNU C Library manual, "Memory Allocation Tunables"): hence `restart_with_few_held_back`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 2**27
"""128 MiB: the largest weight of SD 1 and 2 is 112 MiB in fp32. Above it lie activations of large pictures, which few
other tensors could follow in: kept, they would stand beside the memory that those take."""
_APART = 2**17  # glibc's own threshold at a process's start
_NEVER = 2**31 - 1  # mallopt takes an int
_TUNABLES, _HELD_BACK = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"
_RESTARTED = "LORA_KIT_RESTARTED"  # glibc takes its own variable from a process with more rights than its user's


class _Kept:
    """Below how many bytes this process keeps freed blocks, and how many `pages_of_their_own` it is within."""

    below = 0
    apart = 0


def keep_freed_blocks(below: int = _KEPT) -> bool:
    """Let glibc serve blocks of fewer than so many bytes (128 MiB) from its heap, and keep what is freed there; whether
    that was possible.

    Holds for the whole process, so it is for commands and not for a library call. No number changes by it. What is
    kept goes back to the system by `give_back_freed`. Other C libraries are left alone. Below smaller sizes less memory
    lies in gaps, and the kernel zeroes more of it in every step (docs/benchmarks/memory.md).
    """
    mallopt = _function("mallopt")
    possible = mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, below) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
    _Kept.below = below if possible else 0
    return possible


@contextmanager
def pages_of_their_own() -> Generator[None]:
    """While weights are made, which last: each block from 128 KiB gets pages of its own, and one that is freed leaves
    no gap. Where freed blocks are not kept, nothing changes. Also a decorator."""
    mallopt = _function("mallopt") if _Kept.below else None
    if mallopt is None:
        yield
        return
    _Kept.apart += 1
    mallopt(_M_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        _Kept.apart -= 1
        if not _Kept.apart:
            mallopt(_M_MMAP_THRESHOLD, _Kept.below)


def give_back_freed() -> None:
    """Give freed memory back to the system, after a stage of a run whose tensors were of other sizes than the next
    one's: else it stays resident beside those that do not fit in (malloc_trim(3)).

    What only reference cycles hold is freed first, which takes a tenth of a second. Other C libraries are left alone.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        gc.collect()
        trim(0)


def few_held_back(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process whose threads hold one freed block of each small size back, not seven. What it says
    of that already stays (`GLIBC_TUNABLES=glibc.malloc.tcache_count=7` is glibc's own)."""
    said = environment.get(_TUNABLES, "")
    if _HELD_BACK in said:
        return dict(environment)
    return {**environment, _TUNABLES: ":".join(filter(None, [said, f"{_HELD_BACK}=1"]))}


def restart_with_few_held_back() -> None:
    """Begin this process anew in that environment, the same process with the same arguments, if it is not in it yet.

    For a command's very first lines: nothing that was done before it remains. Costs a start of the interpreter, some
    40 ms. Where the C library is another, or the system does not let it, nothing happens.
    """
    environment = few_held_back(os.environ)
    if environment == dict(os.environ) or _RESTARTED in os.environ or not sys.executable or not sys.orig_argv:
        return
    if _function("malloc_trim") is None:
        return
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment, _RESTARTED: "1"})
    except OSError:
        return  # the run takes more memory, and is the same


@cache
def _function(name: str) -> Callable[..., int] | None:
    """glibc's; musl and macOS have none of these, and Windows' C library cannot be opened without a name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
