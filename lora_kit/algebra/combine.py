"""Several adapters as one: Σ wᵢ · ΔWᵢ exactly, at a lower rank, or by TIES or DARE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters.state import AdapterState
from lora_kit.adapters.updates import LoraUpdate, Update
from lora_kit.algebra.combine_dense import dare, ties
from lora_kit.algebra.lowrank import Budget, Factors, decompose, distance, dropped_norm, stack, truncate
from lora_kit.algebra.lowrank_report import ModuleLoss
from lora_kit.algebra.lowrank_updates import (
    Weights,
    bias_of,
    changes_weight,
    delta_of,
    factorised,
    factors_of,
    lora_from_factors,
    lora_update,
    method_name,
    required_factors,
    weight_shape,
    with_bias,
)
from lora_kit.errors import AdapterFileError, RecipeError
from lora_kit.progress import ProgressBar, no_progress

Method = Literal["concat", "svd", "ties", "dare"]
VECTOR_METHODS = ("norm", "full")
SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class CombineOptions:
    """How adapters become one."""

    method: Method = "concat"
    """`concat`: exact, at the summed rank. `svd`: the best of a lower rank. `ties`, `dare`: entry by entry."""
    budget: Budget | None = None
    """What the result is cut to. `concat` alone does without."""
    density: float = 0.5
    """ties, dare: the share of entries that stay."""
    seed: int = 0
    """dare: of the draw; svd, ties and dare: of the randomised SVD."""
    dtype: torch.dtype | None = None
    """Of the factors. None: the widest that the files hold."""

    def __post_init__(self) -> None:
        if self.method != "concat" and self.budget is None:
            raise RecipeError(f"--method {self.method} needs a size: give --rank N, or --keep E such as 0.95")
        if not 0 < self.density <= 1:
            raise RecipeError(f"--density: got {self.density:g}; allowed: a share above 0 and at most 1")


class Combined(NamedTuple):
    """The result, and what it cost."""

    updates: dict[str, Update]
    losses: tuple[ModuleLoss, ...]
    """Of the low-rank modules, against the exact sum (or the exact TIES or DARE result)."""


class _Term(NamedTuple):
    adapter: int
    update: Update
    weight: float


def combine(
    adapters: Sequence[tuple[AdapterState, float]],
    options: CombineOptions,
    weights: Weights | None = None,
    progress: ProgressBar = no_progress,
) -> Combined:
    """One adapter that does what `adapters` do together, each ΔW (at strength 1) times its weight.

    Low-rank updates are summed by their factors; modules where some update has none are made dense, one at a time,
    and factorised. Norm layers and full differences, where all adapters have such, are summed as they are; so are
    differences of biases.
    weights: the base's, for updates whose ΔW depends on them.
    Raises AdapterFileError listing every module that cannot be combined as asked.
    """
    terms = _by_module(adapters)
    _check(terms, options, weights)
    found: dict[str, Update] = {}
    losses: list[ModuleLoss] = []
    for name, group in progress(list(terms.items()), "combining", len(terms)):
        if _is_plain_sum(group):
            found[name] = _summed(group, options.dtype)
            continue
        found[name], loss = _combined(name, group, options, weights)
        losses.append(loss)
    return Combined(found, tuple(losses))


def _by_module(adapters: Sequence[tuple[AdapterState, float]]) -> dict[str, list[_Term]]:
    terms: dict[str, list[_Term]] = {}
    for index, (state, weight) in enumerate(adapters):
        for name, update in state.updates.items() if weight else ():
            terms.setdefault(name, []).append(_Term(index, update, weight))
    if not terms:
        raise RecipeError("nothing to combine: no adapter was given a weight other than 0")
    return terms


def _check(terms: dict[str, list[_Term]], options: CombineOptions, weights: Weights | None) -> None:
    problems = [f"{name}: {problem}" for name, group in terms.items() if (problem := _problem(group, options, weights))]
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        listed = "\n  ".join([*problems[:SHOWN], *more])
        raise AdapterFileError(f"{len(problems)} modules cannot be combined so; nothing was written:\n  {listed}")


def _problem(group: Sequence[_Term], options: CombineOptions, weights: Weights | None) -> str | None:
    if _is_plain_sum(group):
        return None
    kinds = ", ".join(sorted({method_name(term.update) for term in group}))
    if weights is None and any(term.update.needs_weight for term in group):
        return f"ΔW of {kinds} depends on the base's weight; name the base with --base"
    if options.budget is None and any(
        changes_weight(term.update) and (term.update.needs_weight or factors_of(term.update) is None) for term in group
    ):
        return f"{kinds} has no exact low-rank form; give --rank N or --keep E"
    return None


def _is_plain_sum(group: Sequence[_Term]) -> bool:
    methods = {term.update.method for term in group}
    return len(methods) == 1 and methods <= set(VECTOR_METHODS)


def _summed(group: Sequence[_Term], dtype: torch.dtype | None) -> Update:
    """Σ wᵢ · part of updates whose parts are the differences themselves; a part that one lacks is zero there."""
    parts: dict[str, Tensor] = {}
    for term in group:
        for part, tensor in term.update.parts().items():
            weighted = term.weight * tensor.double()
            parts[part] = parts[part] + weighted if part in parts else weighted
    target = dtype or _widest([term.update for term in group])
    first = group[0].update
    return type(first).from_parts({part: tensor.to(target) for part, tensor in parts.items()}, None, None)


def _combined(
    name: str, group: Sequence[_Term], options: CombineOptions, weights: Weights | None
) -> tuple[LoraUpdate, ModuleLoss]:
    dtype = options.dtype or _widest([term.update for term in group])
    moving = [term for term in group if changes_weight(term.update)]
    low_rank = not any(term.update.needs_weight or factors_of(term.update) is None for term in moving)
    if low_rank and options.method in ("concat", "svd"):
        update, loss = _by_factors(name, moving, options.budget, dtype)
    else:
        assert options.budget is not None, "only a concatenation does without"
        update, loss = factorised(name, _merged(name, moving, options, weights), options.budget, dtype, options.seed)
    return with_bias(update, [bias_of(term.update, term.weight) for term in group], dtype), loss


def _by_factors(
    name: str, group: Sequence[_Term], budget: Budget | None, dtype: torch.dtype
) -> tuple[LoraUpdate, ModuleLoss]:
    strengths, pairs, shape = _strengths(group)
    total = stack(pairs, strengths)
    old_rank = total[0].shape[1]
    matrix = decompose(total)
    norm = float(matrix.values.norm())
    if budget is None:
        update = _concatenated(name, strengths, pairs, shape, dtype)
    else:
        update = lora_update(truncate(matrix, budget.rank_of(matrix.values)), shape, dtype, name)
    rank = update.rank
    lost = dropped_norm(matrix.values, rank)
    return update, ModuleLoss(name, old_rank, rank, norm, lost, distance(total, factors_of(update) or total))


def _strengths(group: Sequence[_Term]) -> tuple[list[float], list[Factors], tuple[int, ...]]:
    """Each term as strength · up · down in float64; of plain LoRA the stored factors themselves, strength = w·α/r."""
    strengths: list[float] = []
    pairs: list[Factors] = []
    for term in group:
        update = term.update
        if isinstance(update, LoraUpdate) and update.mid is None:
            strengths.append(term.weight * update.alpha / update.rank)
            pairs.append((update.up.double().flatten(1), update.down.double().flatten(1)))
        else:
            strengths.append(term.weight)
            pairs.append(required_factors(update))
    return strengths, pairs, weight_shape(group[0].update)


def _concatenated(
    name: str, strengths: Sequence[float], pairs: Sequence[Factors], shape: tuple[int, ...], dtype: torch.dtype
) -> LoraUpdate:
    """All ranks side by side. alpha = summed rank · the largest strength, so that the term which has it keeps its
    factors bit for bit; the others' `up` is multiplied by the ratio of strengths (exact for equal ones)."""
    largest = max(abs(strength) for strength in strengths) or 1.0
    up, down = stack(pairs, [strength / largest for strength in strengths])
    return lora_from_factors((up.to(dtype), down.to(dtype)), shape, up.shape[1] * largest, name)


def _merged(name: str, group: Sequence[_Term], options: CombineOptions, weights: Weights | None) -> Tensor:
    """The dense result in float64, in the weight's shape."""
    if options.method == "ties":
        deltas = [delta_of(name, term.update, weights) for term in group]
        return ties(deltas, [term.weight for term in group], options.density)
    total: Tensor | None = None
    for term in group:
        delta = delta_of(name, term.update, weights)
        if options.method == "dare":
            delta = dare(delta, options.density, options.seed, f"{term.adapter}:{name}")
        total = term.weight * delta if total is None else total.add_(delta, alpha=term.weight)
    assert total is not None
    return total


def _widest(updates: Sequence[Update]) -> torch.dtype:
    dtype = updates[0].dtype
    for update in updates[1:]:
        dtype = torch.promote_types(dtype, update.dtype)
    return dtype
