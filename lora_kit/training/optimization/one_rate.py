"""Optimizers that know one learning rate only, one for each rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class OneRateEach(torch.optim.Optimizer):
    """Several optimizers of one kind, each over one parameter group, that look like one.

    Prodigy (Mishchenko & Defazio 2024) estimates one step size for all of its weights and refuses groups of different
    rates. With one Prodigy per rate, each estimates its own, and the group's rate multiplies that.
    """

    def __init__(self, groups: list[dict[str, Any]], make: Make) -> None:
        super().__init__(groups, {})
        self._parts = [make([group]) for group in groups]
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self._share()

    @property
    def kind(self) -> type[torch.optim.Optimizer]:
        """The class of the optimizers."""
        return type(self._parts[0])

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] (no loss)
        """Each one's step."""
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the parts then work on what was loaded."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """State and groups of the parts are those of the whole, not copies."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.state = self.state
            part.param_groups = [group]
