"""Captions → what the network is told, encoding a caption once where the text encoder is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device

from lora_kit.models import ModelBundle
from lora_kit.recipe.captions import LongText

KEPT_TOKENS = 4096 * 77  # 77 × 768 fp32 states are 231 KiB: at most about 1 GB for SD 1.x


class Conditions:
    """Callable captions → condition. With a trained text encoder gradients flow; with a frozen one the
    states of captions, up to KEPT_TOKENS tokens in all, are kept on the CPU."""

    def __init__(self, bundle: ModelBundle, trained: bool, long: LongText = "cut") -> None:
        """Long: as `data.captions.long`."""
        self.bundle = bundle
        self.trained = trained
        self.long: LongText = long
        self._kept: dict[str, torch.Tensor] = {}
        self._kept_tokens = 0

    def __call__(self, captions: Sequence[str]) -> Any:
        """One condition for all `captions`, on the base's device."""
        if self.trained:
            return self.bundle.family.condition(self.bundle, list(captions), self.long)
        known = {caption: self._kept[caption] for caption in captions if caption in self._kept}
        missing = [caption for caption in dict.fromkeys(captions) if caption not in known]
        if missing:
            with torch.no_grad():
                states = self.bundle.family.caption_states(self.bundle, missing, self.long)
            new = {caption: state.detach().cpu() for caption, state in zip(missing, states, strict=True)}
            self._keep(new)
            known |= new
        # Joined before it is moved: one copy to the device, not one for each caption.
        joined = self.bundle.family.join_states([known[caption] for caption in captions])
        return send_to_device(joined, self.bundle.device)

    def _keep(self, new: dict[str, torch.Tensor]) -> None:
        tokens = sum(len(state) for state in new.values())
        if self._kept_tokens + tokens <= KEPT_TOKENS:
            self._kept.update(new)
            self._kept_tokens += tokens
