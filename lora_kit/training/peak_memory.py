"""The most memory that this process held since it was last asked to forget it."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Begin anew to watch: the GPU's allocator, or on a CPU Linux' high-water mark (elsewhere nothing)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _FORGET.exists():
        _FORGET.write_text("5")  # proc(5): resets VmHWM to what is resident now


def peak_memory(device: torch.device) -> int | None:
    """Bytes: allocated on a GPU, resident on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
