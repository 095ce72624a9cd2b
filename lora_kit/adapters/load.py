"""Adapter state → live layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_kit.adapters.injection import inject
from lora_kit.adapters.state import LoraUpdate, lora_layers, plan_for


@torch.no_grad()
def load_adapter(components: Mapping[str, nn.Module], updates: Mapping[str, LoraUpdate], adapter_name: str) -> None:
    """Inject layers for `updates` and copy the factors in, bit for bit (fp32 layers).

    Components that the adapter does not touch stay as they are. Raises AdapterFileError naming the modules the
    model lacks, before anything is changed.
    """
    networks = dict(components)
    inject(networks, plan_for(networks, updates), adapter_name, 0)
    layers = lora_layers(networks, adapter_name)
    assert layers.keys() == updates.keys(), "inject made other layers than the plan asked for"
    for name, update in updates.items():
        _fill(layers[name].lora_A[adapter_name].weight, update.down)
        _fill(layers[name].lora_B[adapter_name].weight, update.up)


def _fill(weight: Tensor | nn.Module, factor: Tensor) -> None:
    assert isinstance(weight, Tensor)
    assert weight.shape == factor.shape, f"{tuple(weight.shape)} is not {tuple(factor.shape)}"
    weight.copy_(factor)
