"""The most memory that this process held since it was last asked to forget it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
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
    return _status("VmHWM")


def resident_memory() -> int | None:
    """Bytes that are resident now; None where the system does not tell."""
    return _status("VmRSS")


class RunPeak:
    """The most that each stage of a run held: its start, its steps, validations, writing checkpoints, the result."""

    def __init__(self, device: torch.device) -> None:
        self.stages: dict[str, int] = {}
        """Bytes by stage, in the order in which they came; empty where the system does not tell."""
        self._device = device

    @contextmanager
    def watching(self, stage: str) -> Generator[None]:
        """The stage, or a part of it, runs inside. Stages do not nest."""
        reset_peak(self._device)
        try:
            yield
        finally:
            found = peak_memory(self._device)
            if found is not None:
                self.stages[stage] = max(self.stages.get(stage, 0), found)

    def line(self) -> list[str]:
        """For the user, at the end."""
        if not self.stages:
            return []
        kind = "allocated on the GPU" if self._device.type == "cuda" else "resident"
        most = max(self.stages, key=lambda stage: self.stages[stage])
        each = ", ".join(f"{stage} {size / 2**20:,.0f}" for stage, size in self.stages.items())
        return [
            f"peak memory: {self.stages[most] / 2**20:,.1f} MiB {kind}, in its {most} ({each}; `plan --memory` reckons "
            "it beforehand)"
        ]


def _status(name: str) -> int | None:
    if not _STATUS.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
