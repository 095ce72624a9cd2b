"""Activation checkpointing (Chen et al. 2016) of the denoising network, where gradients flow and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kit.models.unets import UNet


def checkpoint_unet(unet: UNet) -> None:
    """Recompute each resnet's and transformer block's activations in the backward pass, from the first one on that
    gradients flow through."""
    unet.enable_gradient_checkpointing(checkpointed)


def checkpointed(block: nn.Module, *inputs: Any) -> Any:
    """The block's output; its activations are kept as its inputs alone, and computed again in the backward pass.

    A block that nothing flows back through (no parameter of it trains, and no input wants a gradient: those in front of
    the first adapter) runs as it is: autograd keeps nothing of it, and there is nothing to compute again. With a text
    encoder that trains, a block that sees its states is not such a one.
    """
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in _leaves(block, inputs)):
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False)


def _leaves(block: nn.Module, inputs: Sequence[Any]) -> Iterator[Tensor]:
    yield from (value for value in inputs if isinstance(value, Tensor))
    yield from block.parameters()
