"""Low-rank matrices by their factors: ΔW = up · down, up [out, r], down [r, in], never multiplied out.

With thin QR of both, up = Q₁R₁ and downᵀ = Q₂R₂, so ΔW = Q₁ (R₁R₂ᵀ) Q₂ᵀ, and the SVD of the small core R₁R₂ᵀ gives
that of ΔW (Golub & Van Loan, Matrix Computations, section 5.4). Everything is computed in float64. A convolution's
kernel is flattened into `in`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.errors import RecipeError

Factors = tuple[Tensor, Tensor]
"""(up [out, r], down [r, in])."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of a matrix is kept: at least one of the two; with both, the lower rank.

    Raises RecipeError for neither, or values that make no sense.
    """

    rank: int | None = None
    keep: float | None = None
    """Share of the energy Σ σ², above 0 and at most 1."""

    def __post_init__(self) -> None:
        if self.rank is None and self.keep is None:
            raise RecipeError("give --rank N, or --keep E with the share of the energy to keep, such as 0.95")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"--rank: got {self.rank}; allowed: whole numbers from 1 on")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise RecipeError(f"--keep: got {self.keep:g}; allowed: a share above 0 and at most 1, such as 0.95")

    def rank_of(self, values: Tensor) -> int:
        """The rank that a matrix with these singular values gets."""
        kept = len(values) if self.keep is None else rank_keeping(values, self.keep)
        return min(kept, len(values) if self.rank is None else self.rank)


class Decomposed(NamedTuple):
    """The thin SVD of a matrix: left · diag(values) · right."""

    left: Tensor
    """[out, k], orthonormal columns."""
    values: Tensor
    """[k], largest first."""
    right: Tensor
    """[k, in], orthonormal rows."""


def decompose(factors: Factors) -> Decomposed:
    """The SVD of up · down in float64; k = min(r, out, in)."""
    up, down = (factor.double() for factor in factors)
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    inner_left, values, inner_right = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return Decomposed(left @ inner_left, values, inner_right @ right.T)


def singular_values(factors: Factors) -> Tensor:
    """Those of up · down, float64, largest first, [min(r, out, in)]."""
    up, down = (factor.double() for factor in factors)
    core = torch.linalg.qr(up, "r").R @ torch.linalg.qr(down.T, "r").R.T
    return torch.linalg.svdvals(core)


def truncate(matrix: Decomposed, rank: int) -> Decomposed:
    """The best approximation of that rank (Eckart & Young 1936); ranks above k change nothing."""
    return Decomposed(matrix.left[:, :rank], matrix.values[:rank], matrix.right[:rank])


def balanced(matrix: Decomposed, dtype: torch.dtype) -> Factors:
    """(up, down) with √values in both, so that neither half's entries grow beyond the other's in a short `dtype`."""
    root = matrix.values.clamp_min(0).sqrt()
    return (matrix.left * root).to(dtype).contiguous(), (root[:, None] * matrix.right).to(dtype).contiguous()


def stack(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Factors of Σ wᵢ · upᵢ · downᵢ at the summed rank: down stacked, wᵢ · up side by side. No product, so exact."""
    up = torch.cat([weight * up for (up, _), weight in zip(terms, weights, strict=True)], dim=1)
    return up, torch.cat([down for _, down in terms])


def rank_keeping(values: Tensor, keep: float) -> int:
    """The least rank whose singular values hold `keep` of the energy Σ σ²; at least 1."""
    energy = values.double().square()
    kept = energy.cumsum(0)
    if not values.numel() or float(kept[-1]) == 0.0:
        return 1
    return min(int((kept < keep * kept[-1]).sum()) + 1, values.numel())


def dropped_norm(values: Tensor, rank: int) -> float:
    """√Σ σ² of what lies beyond `rank`: the Frobenius norm of the truncation's error."""
    return float(values[rank:].double().norm())


def effective_rank(values: Tensor) -> float:
    """exp(−Σ p ln p) with p = σ / Σ σ (Roy & Vetterli 2007, "The effective rank"); 0 for a zero matrix."""
    total = float(values.sum())
    if total == 0.0:
        return 0.0
    share = values.double() / total
    return math.exp(float(torch.special.entr(share).sum()))


def norm(factors: Factors) -> float:
    """‖up · down‖ (Frobenius) in float64, through QR: no cancellation where terms nearly cancel."""
    up, down = (factor.double() for factor in factors)
    return float((torch.linalg.qr(up, "r").R @ torch.linalg.qr(down.T, "r").R.T).norm())


def inner(first: Factors, second: Factors) -> float:
    """⟨U₁D₁, U₂D₂⟩ = tr((U₁ᵀU₂)(D₂D₁ᵀ)) in float64: two small products instead of two dense matrices."""
    up, down = (factor.double() for factor in first)
    other_up, other_down = (factor.double() for factor in second)
    return float(((up.T @ other_up) * (down @ other_down.T)).sum())


def distance(first: Factors, second: Factors) -> float:
    """‖U₁D₁ − U₂D₂‖ (Frobenius) in float64, the rounding of both factor pairs' own dtypes included."""
    up, down = (factor.double() for factor in first)
    other_up, other_down = (factor.double() for factor in second)
    return norm(stack([(up, down), (other_up, other_down)], [1.0, -1.0]))
