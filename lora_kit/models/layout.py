"""What a base is on disk, behind one interface: its configs, and its networks one at a time."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from lora_kit.models.bundle import FirstStage, Tokenizer
from lora_kit.models.text_models import TextConfig, TextModel
from lora_kit.models.unets import UNet


class Configs(NamedTuple):
    """What is known of a base without its weights."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: TextConfig | None
    """None for a base that reads no text; its `text_encoder` and `tokenizer` below are not asked for."""
    scheduler: dict[str, Any]


class Layout(Protocol):
    """A base on disk. Reads raise ModelError where a file is missing, damaged or does not fit its config."""

    def configs(self) -> Configs:
        """The configs, without reading weights."""
        ...

    def unet(self, dtype: torch.dtype) -> UNet:
        """The UNet, held in `dtype`."""
        ...

    def vae(self, dtype: torch.dtype) -> FirstStage:
        """The VAE, held in `dtype`."""
        ...

    def text_encoder(self, dtype: torch.dtype) -> TextModel:
        """The text encoder, held in `dtype`."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, from the base or from where its owner says."""
        ...
