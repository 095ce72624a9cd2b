"""Captions → what the network is told, encoding a caption once where the text encoder is frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lora_kit.data.cache import DiskTexts
from lora_kit.models import ModelBundle
from lora_kit.models.moving import moved_all
from lora_kit.models.released import bring
from lora_kit.recipe.captions import LongText

KEPT_TOKENS = 4096 * 77  # 77 × 768 fp32 states are 231 KiB: at most about 1 GB for SD 1.x


class Conditions:
    """Callable captions → condition. With a trained text encoder gradients flow; with a frozen one states are read
    from disk where they are kept there, and of other captions, up to KEPT_TOKENS tokens in all, kept on the CPU."""

    def __init__(
        self, bundle: ModelBundle, trained: bool, long: LongText = "cut", on_disk: Sequence[DiskTexts] = ()
    ) -> None:
        """Long: as `data.captions.long`. on_disk: states made in the step's own precision."""
        self.bundle = bundle
        self.trained = trained
        self.long: LongText = long
        self.on_disk = tuple(on_disk)
        self._kept: dict[str, torch.Tensor] = {}
        self._kept_tokens = 0

    def __call__(self, captions: Sequence[str]) -> Any:
        """One condition for all `captions`, on the base's device; None for a base that reads no text."""
        if not self.bundle.has_text:
            return None
        if self.trained:
            return self.bundle.family.condition(self.bundle, list(captions), self.long)
        known = self._known(dict.fromkeys(captions))
        missing = [caption for caption in dict.fromkeys(captions) if caption not in known]
        if missing:
            bring(self.bundle, "text_encoder", self.bundle.device)  # it may have waited on the CPU
            with torch.no_grad():
                states = self.bundle.family.caption_states(self.bundle, missing, self.long)
            new = {caption: state.detach().cpu() for caption, state in zip(missing, states, strict=True)}
            self._keep(new)
            known |= new
        # Joined before it is moved: one copy to the device, not one for each caption.
        joined = self.bundle.family.join_states([known[caption] for caption in captions])
        return moved_all(joined, self.bundle.device)

    def _known(self, captions: Iterable[str]) -> dict[str, torch.Tensor]:
        known: dict[str, torch.Tensor] = {}
        for caption in captions:
            state = self._kept.get(caption)
            for texts in self.on_disk if state is None else ():
                state = texts.read(caption) if state is None else state
            if state is not None:
                known[caption] = state
        return known

    def _keep(self, new: dict[str, torch.Tensor]) -> None:
        tokens = sum(len(state) for state in new.values())
        if self._kept_tokens + tokens <= KEPT_TOKENS:
            self._kept.update(new)
            self._kept_tokens += tokens
