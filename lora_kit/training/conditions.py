"""Captions → what the network is told, encoding a caption once where the text encoder is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lora_kit.models import ModelBundle

KEPT_CAPTIONS = 4096  # 77 × 768 fp32 states are 231 KiB each: at most about 1 GB for SD 1.x


class Conditions:
    """Callable captions → condition. With a trained text encoder gradients flow; with a frozen one the
    states of up to KEPT_CAPTIONS captions are kept on the CPU."""

    def __init__(self, bundle: ModelBundle, trained: bool) -> None:
        self.bundle = bundle
        self.trained = trained
        self._kept: dict[str, torch.Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Any:
        """One condition for all `captions`, on the base's device."""
        if self.trained:
            return self.bundle.family.condition(self.bundle, list(captions))
        missing = [c for c in dict.fromkeys(captions) if c not in self._kept]
        if missing:
            with torch.no_grad():
                states = self.bundle.family.condition(self.bundle, missing)
            new = dict(zip(missing, states.detach().cpu().unbind(), strict=True))
            if len(self._kept) + len(new) <= KEPT_CAPTIONS:
                self._kept.update(new)
            else:
                new = {**self._kept, **new}
                return torch.stack([new[c] for c in captions]).to(self.bundle.device)
        return torch.stack([self._kept[c] for c in captions]).to(self.bundle.device)
