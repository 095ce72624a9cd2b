"""Two adapters side by side: the angle and the length of every ΔW, from their factors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters.state import AdapterState
from lora_kit.adapters.updates import Update
from lora_kit.algebra import lowrank
from lora_kit.algebra.lowrank_updates import Weights, bias_of, changes_weight, delta_of, factors_of
from lora_kit.errors import AdapterFileError


class ModulePair(NamedTuple):
    """One module that both adapters change."""

    module: str
    """Dotted name; with ` (bias)` after it, the pair is of the bias."""
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
            pairs += _pairs(name, first.updates[name], second.updates[name], weights)
        except AdapterFileError as error:
            not_compared[name] = str(error).removeprefix(f"{name}: ")
    return Comparison(
        tuple(pairs),
        tuple(name for name in first.updates if name not in second.updates),
        tuple(name for name in second.updates if name not in first.updates),
        not_compared,
    )


def _pairs(name: str, first: Update, second: Update, weights: Weights | None) -> Iterator[ModulePair]:
    """Of the weight, and of the bias where either changes it."""
    if changes_weight(first) or changes_weight(second):
        yield _pair(name, first, second, weights)
    biases = bias_of(first), bias_of(second)
    size = next((bias for bias in biases if bias is not None), None)
    if size is not None:
        one, other = (torch.zeros_like(size) if bias is None else bias for bias in biases)
        yield _dense_pair(f"{name} (bias)", one, other)


def _pair(name: str, first: Update, second: Update, weights: Weights | None) -> ModulePair:
    one, other = (None if update.needs_weight else factors_of(update) for update in (first, second))
    if one is not None and other is not None:
        norms = lowrank.norm(one), lowrank.norm(other)
        return ModulePair(name, *norms, lowrank.inner(one, other), lowrank.distance(one, other))
    found = [delta_of(name, update, weights) if changes_weight(update) else None for update in (first, second)]
    size = next(delta for delta in found if delta is not None)
    return _dense_pair(name, *(torch.zeros_like(size) if delta is None else delta for delta in found))


def _dense_pair(name: str, first: Tensor, second: Tensor) -> ModulePair:
    inner = float((first * second).sum())
    return ModulePair(name, float(first.norm()), float(second.norm()), inner, float((first - second).norm()))


def _cosine(inner: float, product: float) -> float | None:
    return max(-1.0, min(1.0, inner / product)) if product else None
