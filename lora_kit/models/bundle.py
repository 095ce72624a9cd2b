"""A base model: its networks, tokenizer, schedule and family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lora_kit.recipe.captions import LongText

FirstStage = AutoencoderKL | VQModel


class Family(Protocol):
    """What differs between model families. The loop, the objective and the file code know none by name."""

    name: str
    """`sd1`, `sd2`, …"""

    def encode(self, bundle: ModelBundle, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [b, 3, H, W] in -1..1 → mean and standard deviation of the latents [b, c, h, w], unscaled fp32."""
        ...

    def target_latents(self, bundle: ModelBundle, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """The clean latents z0 = scale · (mean + std · noise) that the diffusion is trained on, fp32."""
        ...

    def condition(self, bundle: ModelBundle, captions: list[str], long: LongText = "cut") -> Any:
        """What the network is told besides z_t and t: for SD the text states [b, tokens, width].

        long: captions longer than the text encoder reads are cut off, or encoded in chunks.
        """
        ...

    def caption_states(self, bundle: ModelBundle, captions: list[str], long: LongText = "cut") -> list[Tensor]:
        """Each caption's part of the condition, to be kept and joined again: for SD its text states [tokens, width]."""
        ...

    def join_states(self, states: Sequence[Tensor]) -> Any:
        """`caption_states` of a micro-batch, on one device → its condition: `condition` is one after the other."""
        ...

    def truncated(self, bundle: ModelBundle, captions: list[str]) -> int:
        """How many captions are longer than a condition without chunks can hold, so that their end is cut off."""
        ...

    def predict(self, bundle: ModelBundle, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        """The network's output for z_t [b, c, h, w] and t [b] (int64), in the latents' shape."""
        ...


@dataclass
class ModelBundle:
    """A loaded (or, on the meta device, only laid out) base model."""

    family: Family
    unet: UNet2DConditionModel
    vae: FirstStage
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer | None
    scheduler_config: dict[str, Any]
    """The base's scheduler/scheduler_config.json: betas, prediction_type, …"""
    prediction_type: str
    """`epsilon`, `v_prediction` or `sample`, after any override."""
    source: str
    """The base as the user named it."""

    @property
    def components(self) -> dict[str, nn.Module]:
        """The networks that rules can pick from, by the name a rule starts with."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    @property
    def device(self) -> torch.device:
        """Where the UNet lies; the other networks follow it."""
        return self.unet.device
