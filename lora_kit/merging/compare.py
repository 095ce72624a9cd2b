"""Two adapters side by side: the angle and the length of every ΔW, from their factors."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from lora_kit.adapters.state import AdapterState
from lora_kit.adapters.updates import Update
from lora_kit.errors import AdapterFileError
from lora_kit.merging import lowrank
from lora_kit.merging.lowrank_updates import Weights, delta_of, factors_of


class ModulePair(NamedTuple):
    """One module that both adapters change."""

    module: str
    first_norm: float
    """‖ΔW‖ of the first adapter."""
    second_norm: float
    inner: float
    """⟨ΔW₁, ΔW₂⟩ = Σ ΔW₁ · ΔW₂."""
    difference: float
    """‖ΔW₁ − ΔW₂‖."""

    @property
    def cosine(self) -> float | None:
        """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖), within [-1, 1]; None where one of them is zero."""
        return _cosine(self.inner, self.first_norm * self.second_norm)

    @property
    def ratio(self) -> float | None:
        """‖ΔW₂‖ / ‖ΔW₁‖; None where the first is zero."""
        return self.second_norm / self.first_norm if self.first_norm else None


class Comparison(NamedTuple):
    """Everything two adapters have in common, and what only one has."""

    pairs: tuple[ModulePair, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    not_compared: dict[str, str]
    """Module → why not."""

    @property
    def shared(self) -> ModulePair:
        """All shared modules taken as one long vector."""
        return ModulePair(
            "in all",
            math.hypot(*(pair.first_norm for pair in self.pairs)),
            math.hypot(*(pair.second_norm for pair in self.pairs)),
            math.fsum(pair.inner for pair in self.pairs),
            math.hypot(*(pair.difference for pair in self.pairs)),
        )


def compare_adapters(first: AdapterState, second: AdapterState, weights: Weights | None = None) -> Comparison:
    """Compare two adapters of one base, at strength 1, in float64.

    Low-rank updates are never multiplied out: ⟨U₁D₁, U₂D₂⟩ = tr((U₁ᵀU₂)(D₂D₁ᵀ)). Others are made dense, one module
    at a time; where ΔW depends on the base's weight and `weights` is None, the module is listed as not compared.
    """
    pairs: list[ModulePair] = []
    not_compared: dict[str, str] = {}
    for name in (name for name in first.updates if name in second.updates):
        try:
            pairs.append(_pair(name, first.updates[name], second.updates[name], weights))
        except AdapterFileError as error:
            not_compared[name] = str(error).removeprefix(f"{name}: ")
    return Comparison(
        tuple(pairs),
        tuple(name for name in first.updates if name not in second.updates),
        tuple(name for name in second.updates if name not in first.updates),
        not_compared,
    )


def _pair(name: str, first: Update, second: Update, weights: Weights | None) -> ModulePair:
    one, other = (None if update.needs_weight else factors_of(update) for update in (first, second))
    if one is not None and other is not None:
        norms = lowrank.norm(one), lowrank.norm(other)
        return ModulePair(name, *norms, lowrank.inner(one, other), lowrank.distance(one, other))
    deltas: list[Tensor] = [delta_of(name, update, weights) for update in (first, second)]
    inner = float((deltas[0] * deltas[1]).sum())
    return ModulePair(
        name, float(deltas[0].norm()), float(deltas[1].norm()), inner, float((deltas[0] - deltas[1]).norm())
    )


def _cosine(inner: float, product: float) -> float | None:
    return max(-1.0, min(1.0, inner / product)) if product else None
