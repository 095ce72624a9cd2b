"""Adapter state → live layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_kit.adapters.inject import inject
from lora_kit.adapters.state import lora_layers, plain_lora, plan_for
from lora_kit.adapters.updates import Update


@torch.no_grad()
def load_adapter(components: Mapping[str, nn.Module], updates: Mapping[str, Update], adapter_name: str) -> None:
    """Inject layers for `updates` and copy the factors in (into fp32 layers, so nothing is lost).

    Components that the adapter does not touch stay as they are. Raises AdapterFileError naming the modules the
    model lacks, or that are no plain LoRA, before anything is changed.
    """
    networks = dict(components)
    pairs = plain_lora(updates)
    inject(networks, plan_for(networks, pairs), adapter_name, 0)
    layers = lora_layers(networks, adapter_name)
    assert layers.keys() == updates.keys(), "inject made other layers than the plan asked for"
    for name, update in pairs.items():
        _fill(layers[name].lora_A[adapter_name].weight, update.down)
        _fill(layers[name].lora_B[adapter_name].weight, update.up)


def _fill(weight: Tensor | nn.Module, factor: Tensor) -> None:
    assert isinstance(weight, Tensor)
    assert weight.shape == factor.shape, f"{tuple(weight.shape)} is not {tuple(factor.shape)}"
    weight.copy_(factor)
