"""Classifier-free guidance: what the network predicts with the caption and without, as one batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kit.inference.captions import CaptionStates
from lora_kit.inference.settings import SamplingSettings
from lora_kit.models import ModelBundle


class Guidance:
    """Of b pictures that are drawn together.

    ε = ε(z, ∅) + g · (ε(z, c) - ε(z, ∅)), with g = w + 1 of Ho & Salimans 2022, equation 6; the negative prompt stands
    for ∅. With g ≤ 1, or a network that reads no text, ε(z, c) alone.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        captions: CaptionStates,
        settings: SamplingSettings,
        prompts: Sequence[str],
        beside: Tensor | None,
    ) -> None:
        """beside: what the network is given beside the latents [b, k, h, w]; None: nothing."""
        self.bundle, self.captions, self.prompts, self.beside = bundle, captions, list(prompts), beside
        self.scale, self.negative = settings.guidance, settings.negative_prompt
        self.guided = settings.guidance > 1 and bundle.has_text
        self._condition = self._told(len(prompts) * self.guided)

    def predict(self, noisy: Tensor, timestep: Tensor, same: Sequence[Hashable] | None = None) -> Tensor:
        """The guided output for z_t [b, c, h, w] at one timestep, fp32.

        same: a key for each picture, equal for those with equal z_t (and `beside`), whose unconditional half is then
        computed once; None: all may differ.
        """
        if not self.guided:
            return self._network(noisy, timestep, self._condition, self.beside)
        keys: list[Hashable] = [*range(len(noisy))] if same is None else list(same)
        distinct = list(dict.fromkeys(keys))
        rows, of_picture = [keys.index(key) for key in distinct], [distinct.index(key) for key in keys]
        beside = None if self.beside is None else torch.cat([self.beside[rows], self.beside])
        condition = self._condition if len(rows) == len(keys) else self._told(len(rows))
        output = self._network(torch.cat([noisy[rows], noisy]), timestep, condition, beside)
        unconditional, conditional = output[: len(rows)][of_picture], output[len(rows) :]
        return unconditional + self.scale * (conditional - unconditional)

    def _told(self, unconditional: int) -> Any:
        """The condition of so many rows without the caption, and then each picture's with it."""
        return self.captions.condition([self.negative] * unconditional + self.prompts)

    def _network(self, noisy: Tensor, timestep: Tensor, condition: Any, beside: Tensor | None) -> Tensor:
        return self.bundle.family.predict(self.bundle, noisy, timestep.expand(len(noisy)), condition, beside).float()
