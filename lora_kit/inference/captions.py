"""What the network is told of each caption, encoded once however often it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lora_kit.models import ModelBundle
from lora_kit.recipe.captions import LongText


class CaptionStates:
    """The states of every caption that was asked for, each encoded at its first use.

    One by one rather than in batches: a caption's states are then the same bits whatever is drawn beside it. They hold
    as long as the text encoder's weights and adapters stay as they are; after that, begin a new one.
    """

    def __init__(self, bundle: ModelBundle, long: LongText = "cut") -> None:
        """long: what becomes of captions longer than the text encoder reads."""
        self.bundle = bundle
        self.long: LongText = long
        self._states: dict[str, Tensor] = {}

    def condition(self, captions: Sequence[str]) -> Any:
        """The captions as one condition, as `Family.condition` makes it of the same captions."""
        family = self.bundle.family
        if not self.bundle.has_text:
            return family.condition(self.bundle, list(captions))
        for caption in dict.fromkeys(captions):
            if caption not in self._states:
                (self._states[caption],) = family.caption_states(self.bundle, [caption], self.long)
        return family.join_states([self._states[caption] for caption in captions])
