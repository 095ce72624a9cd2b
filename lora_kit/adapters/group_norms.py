"""A way around torch 2.13's crash in the backward pass of group norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def with_gradient(norm: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a GroupNorm whose weights train, such that the input takes a gradient, too.

    On the CPU and over channels-last memory, torch 2.13's group norm writes the input's gradient even where none is
    wanted, as over the first frozen layers, and the process dies. Wanting it costs a buffer of the input's size. A
    forward pre-hook, for norms that are trained as they are.
    """
    if not isinstance(norm, nn.GroupNorm) or not torch.is_grad_enabled():
        return inputs
    x = inputs[0]
    wanted = isinstance(x, Tensor) and not x.requires_grad and x.device.type == "cpu"
    return (x.detach().requires_grad_(), *inputs[1:]) if wanted else inputs
