"""Tensors on their way to a GPU, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

QUEUES = {"cuda"}
"""Types of device that work through a queue of their own, so that waiting for one costs time; a CPU has none."""


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. A copy from the CPU to a GPU is queued there behind what the GPU has to do.

    A plain `.to(device)` waits until all of that is done. The copy is read from page-locked memory, which torch's
    allocator keeps and gives to others only once the copy is over.
    """
    if device.type not in QUEUES or tensor.device.type != "cpu":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def moved_all(condition: Any, device: torch.device) -> Any:
    """`moved` for a tensor, a NamedTuple of tensors, or None."""
    if isinstance(condition, Tensor):
        return moved(condition, device)
    if isinstance(condition, tuple):
        parts = [moved_all(part, device) for part in cast("tuple[Any, ...]", condition)]
        return cast(Any, type(condition))(*parts)  # pyright: ignore[reportUnknownArgumentType]
    return condition


def rows_on(rows: Sequence[int], device: torch.device) -> Tensor:
    """Indices, int64, on `device`: a tensor indexed by a list copies the list there, and waits."""
    return moved(torch.tensor(list(rows), dtype=torch.int64), device)
