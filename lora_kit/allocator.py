"""How this process gets memory from the system: large blocks are kept for the next tensor of their size.

glibc maps every block above 32 MiB (M_MMAP_THRESHOLD's dynamic limit, mallopt(3)) and unmaps it when it is freed. A
training step on a CPU makes many such blocks and drops them at once: a convolution of 2560 channels copies its 59 MiB
of bf16 weight into oneDNN's layout in every call. Each time the kernel has to zero fresh pages, which took 14 % of the
processor time of a step at SD 1.5's size and 256 px (docs/benchmarks/step.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 2**27
"""128 MiB: the largest weight of SD 1 and 2 is 112 MiB in fp32. Above it lie activations of large pictures, which few
other tensors could follow in: kept, they would stand beside the memory that those take."""
_NEVER = 2**31 - 1  # mallopt takes an int


def keep_freed_blocks() -> bool:
    """Let glibc serve blocks below 128 MiB from its heap, and keep what is freed there; whether that was possible.

    Holds for the whole process, so it is for commands and not for a library call. No number changes by it. What is
    kept goes back to the system by malloc_trim(3). Elsewhere than with glibc this does nothing.
    """
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _KEPT) and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's; musl and macOS have none, and Windows' C library cannot be opened without a name."""
    try:
        return ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return None
