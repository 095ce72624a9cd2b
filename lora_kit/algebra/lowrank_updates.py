"""Updates of any method ↔ factor pairs and dense matrices in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_kit.adapters.updates import FullUpdate, LoraUpdate, Update
from lora_kit.algebra.lowrank import Budget, Decomposed, Factors, balanced
from lora_kit.algebra.lowrank_dense import factorise
from lora_kit.algebra.lowrank_report import ModuleLoss
from lora_kit.errors import AdapterFileError

Weights = Callable[[str], Tensor]
"""Dotted module name → the base's weight."""


def factors_of(update: Update) -> Factors | None:
    """(up [out, r], down [r, in·kh·kw]) in float64 with alpha / rank folded in; None without an exact low-rank form."""
    return update.factors(torch.float64)


def delta_of(name: str, update: Update, weights: Weights | None) -> Tensor:
    """ΔW at strength 1 in float64, in the weight's shape.

    Raises AdapterFileError where ΔW depends on the base's weight and no base is given, or the weight is not changed.
    """
    if update.needs_weight and weights is None:
        raise AdapterFileError(f"{name}: ΔW of {method_name(update)} depends on the base's weight; name it with --base")
    weight = weights(name) if update.needs_weight and weights is not None else None
    delta = update.weight_delta(1.0, weight, torch.float64)
    if delta is None:
        raise AdapterFileError(f"{name}: its {method_name(update)} update changes no weight")
    return delta


def changes_weight(update: Update) -> bool:
    """Whether there is a ΔW at all: a full difference may be of the bias alone."""
    return not (isinstance(update, FullUpdate) and update.diff is None)


def with_bias(update: LoraUpdate, biases: Sequence[Tensor | None], dtype: torch.dtype) -> LoraUpdate:
    """The update with the sum of those differences of the bias (`diff_b`); as it is where there are none."""
    found = [bias for bias in biases if bias is not None]
    return replace(update, bias=torch.stack(found).sum(dim=0).to(dtype)) if found else update


def bias_of(update: Update, weight: float = 1.0) -> Tensor | None:
    """weight · Δbias at strength 1 in float64; None where the bias stays."""
    delta = update.bias_delta(1.0, None, torch.float64)
    return None if delta is None else weight * delta


def method_name(update: Update) -> str:
    """`lora`, `dora` (LoRA with a magnitude), `loha`, `loha with magnitude` …"""
    if "magnitude" not in update.parts():
        return update.method
    return "dora" if update.method == "lora" else f"{update.method} with magnitude"


def required_factors(update: Update) -> Factors:
    """`factors_of` where the caller has seen that there are some."""
    factors = factors_of(update)
    assert factors is not None, f"{update.method} has no low-rank form"
    return factors


def weight_shape(update: Update) -> tuple[int, ...]:
    """Of the weight that an update with a low-rank form changes."""
    if isinstance(update, LoraUpdate) and update.mid is None:
        return (update.up.shape[0], *update.down.shape[1:])
    delta = update.weight_delta(0.0)
    assert delta is not None
    return tuple(delta.shape)


def factorised(
    name: str, delta: Tensor, budget: Budget, dtype: torch.dtype, seed: int = 0
) -> tuple[LoraUpdate, ModuleLoss]:
    """The factors of a dense ΔW and what they lose, measured against it. `delta` (float64) is used up."""
    matrix = delta.flatten(1)
    norm = float(matrix.norm())
    found = factorise(matrix, budget, seed)
    update = lora_update(found, tuple(delta.shape), dtype, name)
    up, down = required_factors(update)
    lost = max(norm**2 - float(found.values.square().sum()), 0.0) ** 0.5
    error = float(matrix.addmm_(up, down, alpha=-1).norm())
    return update, ModuleLoss(name, None, update.rank, norm, lost, error)


def lora_update(matrix: Decomposed, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> LoraUpdate:
    """A plain LoRA update of a weight of `shape` [out, in] or [out, in, kh, kw], alpha = rank: ΔW = up · down.

    Raises AdapterFileError if a factor overflows `dtype`.
    """
    up, down = balanced(matrix, dtype)
    return lora_from_factors((up, down), shape, float(up.shape[1]), name)


def lora_from_factors(factors: Factors, shape: tuple[int, ...], alpha: float, name: str) -> LoraUpdate:
    """The same from factors as they are: ΔW = (alpha / rank) · up · down."""
    up, down = factors
    if not (bool(torch.isfinite(up).all()) and bool(torch.isfinite(down).all())):
        got = str(up.dtype).removeprefix("torch.")
        raise AdapterFileError(f"{name}: a factor overflows {got}; nothing was written. Use --dtype bf16 or fp32.")
    window = (1, 1) if len(shape) > 2 else ()
    return LoraUpdate(down.reshape(down.shape[0], *shape[1:]), up.reshape(*up.shape, *window), alpha)
