"""Autocast, in the backward passes of this project's own autograd functions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(dy: Tensor) -> AbstractContextManager[Any]:
    """A backward pass is in the precision of its forward pass, whatever surrounds it. Autocast is seldom on there, and
    turning it off takes as long as a small product."""
    device = dy.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
