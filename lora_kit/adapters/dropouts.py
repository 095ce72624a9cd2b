"""Rank and module dropout, drawn from torch's global generator: the training loop seeds it by (seed, step, sample)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def add_dropouts(down: nn.Module, up: nn.Module, rank_dropout: float, module_dropout: float) -> None:
    """Let PEFT's two factors drop ranks, or the whole update, while they train (sd-scripts' formulas).

    Rank dropout p: each sample loses each of the r directions with probability p, and the rest is scaled by
    1 / (1 - p). Module dropout p: with probability p the update is left out, for the whole micro-batch, unscaled.
    """
    if rank_dropout:
        down.register_forward_hook(_Ranks(rank_dropout))
    if module_dropout:
        up.register_forward_hook(_Whole(module_dropout))


def left_out(probability: float) -> bool:
    """Whether a module's update is left out of this forward pass. Drawn on the CPU: the decision is the program's."""
    return probability > 0 and float(torch.rand(())) < probability


class _Ranks:
    """Forward hook of the down projection: the output is [b, …, r] of a linear, [b, r, h, w] of a convolution."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        ranks = 1 if isinstance(module, nn.Conv2d) else output.ndim - 1
        shape = [output.shape[0], *(1 for _ in output.shape[1:])]
        shape[ranks] = output.shape[ranks]
        kept = torch.rand(shape, device=output.device) >= self.probability
        return output * (kept.to(output.dtype) / (1 - self.probability))


class _Whole:
    """Forward hook of the up projection."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output * 0.0 if module.training and left_out(self.probability) else output
