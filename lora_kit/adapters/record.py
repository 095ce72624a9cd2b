"""What a network was like before adapters were injected, kept on the network itself (so that a copy keeps it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_kit.errors import TargetError

_ATTRIBUTE = "_lora_kit_record"


@dataclass
class Fused:
    """What `fuse` took out of a network, to be put back. Names are as in the bare network."""

    layers: dict[str, nn.Module]
    """Module → the layers that stood in its place."""
    originals: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Parameter → what it was, on the CPU (`keep="cpu"`)."""
    digests: dict[str, str] = field(default_factory=dict[str, str])
    """Parameter → sha256 of what it was (`keep="none"`)."""


@dataclass
class Tokens:
    """A text encoder's learned tokens, and what it had before them."""

    tokenizer: Any
    """The base's own."""
    embedding: nn.Module
    """The base's own."""
    learned: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    """Adapter → token → its vector [width]."""


@dataclass
class Record:
    """One network's adapters and its state before the first of them."""

    requires_grad: dict[str, bool]
    """Parameter name → flag."""
    adapters: list[str] = field(default_factory=list[str])
    """Names, in the order of injection."""
    full: dict[str, dict[str, torch.dtype]] = field(default_factory=dict[str, dict[str, torch.dtype]])
    """Adapter → name of each parameter it trains whole (as in the bare network) → precision before."""
    fused: Fused | None = None
    """Set while the adapters are fused into the weights."""
    tokens: Tokens | None = None
    """Set while an adapter's learned tokens are in; of the text encoder's record alone."""


def start_record(network: nn.Module) -> Record:
    """The network's record; a network without one gets it and is frozen."""
    if _ATTRIBUTE not in vars(network):
        flags = {name: weight.requires_grad for name, weight in network.named_parameters()}
        vars(network)[_ATTRIBUTE] = Record(flags)
        network.requires_grad_(False)
    return record_of(network)


def record_of(network: nn.Module) -> Record:
    """The network's record, or an empty one if nothing is injected."""
    return vars(network).get(_ATTRIBUTE) or Record({})


def forget(network: nn.Module, adapter_name: str) -> None:
    """Drop the adapter from the record; with the last one the flags are restored and the record goes."""
    record = record_of(network)
    if adapter_name in record.adapters:
        record.adapters.remove(adapter_name)
    if record.adapters or _ATTRIBUTE not in vars(network):
        return
    for name, flag in record.requires_grad.items():
        network.get_parameter(name).requires_grad_(flag)
    del vars(network)[_ATTRIBUTE]


def adapter_names(components: Mapping[str, nn.Module]) -> list[str]:
    """The adapters injected into any of the components, in the order of injection."""
    return list(dict.fromkeys(name for network in components.values() for name in record_of(network).adapters))


def is_fused(components: Mapping[str, nn.Module]) -> bool:
    """Whether adapters are fused into the weights of any of the components."""
    return any(record_of(network).fused for network in components.values())


def require_unfused(components: Mapping[str, nn.Module]) -> None:
    """Raise TargetError while adapters are fused: the layers are out, and what is live cannot be changed."""
    if is_fused(components):
        listed = ", ".join(adapter_names(components))
        raise TargetError(f"the adapters are fused into the weights ({listed}); call unfuse first.")
