"""An adapter at another rank: the best low-rank approximation of every ΔW, from its factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from lora_kit.adapters.updates import LoraUpdate, Update
from lora_kit.algebra.lowrank import Budget, decompose, distance, dropped_norm, truncate
from lora_kit.algebra.lowrank_report import ModuleLoss
from lora_kit.algebra.lowrank_updates import (
    bias_of,
    changes_weight,
    delta_of,
    factorised,
    factors_of,
    lora_update,
    method_name,
    required_factors,
    weight_shape,
    with_bias,
)
from lora_kit.errors import AdapterFileError
from lora_kit.progress import ProgressBar, no_progress

SHOWN = 20


class Resized(NamedTuple):
    """The updates at their new ranks."""

    updates: dict[str, Update]
    losses: tuple[ModuleLoss, ...]
    kept: tuple[str, ...]
    """Modules that stay as they are: plain LoRA within the budget already; norm layers and differences of a bias
    alone, which have no rank."""


def resize(
    updates: Mapping[str, Update],
    budget: Budget,
    dtype: torch.dtype | None = None,
    progress: ProgressBar = no_progress,
) -> Resized:
    """Truncate every update to the budget; exact in float64 up to the truncation, then one cast to `dtype`.

    dtype: of the new factors; None: each update's own. A new update is plain LoRA with alpha = rank and √σ in both
    factors. Any method whose ΔW is told by the file alone can be resized (LoCon, LoHa, LoKr; LoKr and full
    differences are made dense, one at a time).

    A difference of the bias beside it goes along as it is.

    Raises AdapterFileError naming every module that cannot: DoRA, OFT, BOFT, GLoRA and IA3 scale or turn the base's
    weight, so their ΔW has no rank of its own to cut and its error would depend on the base.
    """
    _check(updates)
    found: dict[str, Update] = {}
    losses: list[ModuleLoss] = []
    kept: list[str] = []
    for name, update in progress(list(updates.items()), "resizing", len(updates)):
        if update.method == "norm" or not changes_weight(update):
            found[name] = update
            kept.append(name)
            continue
        found[name], loss = _resized(name, update, budget, dtype)
        losses.append(loss)
        if found[name] is update:
            kept.append(name)
    return Resized(found, tuple(losses), tuple(kept))


def _check(updates: Mapping[str, Update]) -> None:
    problems: list[str] = []
    for name, update in updates.items():
        if update.needs_weight:
            problems.append(
                f"{name}: ΔW of {method_name(update)} depends on the base's weight, so it has no rank to cut"
            )
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        listed = "\n  ".join([*problems[:SHOWN], *more])
        raise AdapterFileError(f"{len(problems)} modules cannot be resized; nothing was written:\n  {listed}")


def _resized(name: str, update: Update, budget: Budget, dtype: torch.dtype | None) -> tuple[Update, ModuleLoss]:
    factors = factors_of(update)
    target = dtype or update.dtype
    if factors is None:
        small, loss = factorised(name, delta_of(name, update, None), budget, target)
        return with_bias(small, [bias_of(update)], target), loss
    matrix = decompose(factors)
    norm = float(matrix.values.norm())
    rank = budget.rank_of(matrix.values)
    old_rank = factors[0].shape[1]
    if isinstance(update, LoraUpdate) and update.mid is None and rank >= min(update.rank, len(matrix.values)):
        return _cast(update, target), ModuleLoss(name, old_rank, update.rank, norm, 0.0, _cast_error(update, target))
    small = lora_update(truncate(matrix, rank), weight_shape(update), target, name)
    error = distance(factors, required_factors(small))
    return with_bias(small, [bias_of(update)], target), ModuleLoss(
        name, old_rank, small.rank, norm, dropped_norm(matrix.values, rank), error
    )


def _cast(update: LoraUpdate, dtype: torch.dtype) -> LoraUpdate:
    if update.dtype == dtype:
        return update
    bias = None if update.bias is None else update.bias.to(dtype)
    return replace(update, down=update.down.to(dtype), up=update.up.to(dtype), bias=bias)


def _cast_error(update: LoraUpdate, dtype: torch.dtype) -> float:
    if update.dtype == dtype:
        return 0.0
    return distance(required_factors(update), required_factors(_cast(update, dtype)))
