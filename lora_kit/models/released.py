"""Encoders whose weights are given back while nobody needs them, and are brought again when somebody does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_kit.models.bundle import ModelBundle
from lora_kit.models.first_stage import first_stage_class
from lora_kit.models.text_models import text_model

RELEASED = ("vae", "text_encoder")
"""The networks of a bundle that can be given back, by its fields' names."""


def release(bundle: ModelBundle, name: str) -> int:
    """Give back a network's weights; the bytes they took, 0 if they cannot be read again or are gone already.

    What stands in its place has its config and is on the meta device: whoever needs it calls `bring`.
    """
    network: Any = getattr(bundle, name)
    if bundle.recall is None or not bundle.recall.can or is_released(network):
        return 0
    with torch.device("meta"):
        hollow: Any = (
            first_stage_class(network.config, bundle.source).from_config(network.config)
            if name == "vae"
            else text_model(network.config)
        )
    hollow.requires_grad_(False).train(network.training)
    setattr(bundle, name, hollow)
    return sum(weight.numel() * weight.element_size() for weight in network.parameters())


def bring(bundle: ModelBundle, name: str, device: torch.device) -> None:
    """Have a network's weights on `device`: from where they wait, or read again if they were given back."""
    network: Any = getattr(bundle, name)
    if is_released(network) and bundle.recall is not None:
        mode = network.training
        network = bundle.recall(name).train(mode)
        setattr(bundle, name, network)
    if next(network.parameters()).device != device:
        network.to(device)


def is_released(network: nn.Module) -> bool:
    """Whether its weights were given back."""
    return next(network.parameters()).is_meta
