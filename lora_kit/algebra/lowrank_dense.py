"""Dense matrices → factors of low rank: a thin SVD where it is cheap, a randomised one where it is not."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kit.algebra.lowrank import Budget, Decomposed, rank_keeping, truncate

OVERSAMPLING = 10
POWER_ITERATIONS = 3
"""Halko, Martinsson & Tropp advise 5 to 10 extra columns and 1 to 4 iterations; the spectra of trained differences
fall slowly, which is where iterations count."""
THIN_BELOW = 256
"""Up to this smaller side a thin SVD costs less than setting up the sketch."""


def randomised_svd(matrix: Tensor, rank: int, seed: int = 0) -> Decomposed:
    """About the first `rank` singular triples of a dense [out, in] matrix, float64.

    Halko, Martinsson & Tropp 2011, "Finding structure with randomness", algorithms 4.4 (the range finder with power
    iterations, orthonormalised at each) and 5.1. What it finds is a projection of `matrix`, so its values' energy is
    never above the true one, and ‖matrix − result‖² = ‖matrix‖² − Σ values².
    """
    dense = matrix.double()
    columns = min(rank + OVERSAMPLING, *dense.shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(dense.shape[1], columns, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(dense @ start).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(dense @ torch.linalg.qr(dense.T @ basis).Q).Q
    return truncate(_projected(dense, basis), rank)


def thin_svd(matrix: Tensor) -> Decomposed:
    """All min(out, in) singular triples of a dense matrix, float64."""
    return Decomposed(*torch.linalg.svd(matrix.double(), full_matrices=False))


def factorise(matrix: Tensor, budget: Budget, seed: int = 0) -> Decomposed:
    """The leading singular triples of a dense matrix, as many as the budget allows.

    Exact (thin SVD) where the smaller side is short or most of the triples are wanted; else randomised, its sketch
    doubled until it holds `keep`.
    """
    smaller, rank = min(matrix.shape), budget.rank
    if budget.keep is None:
        assert rank is not None, "one of rank and keep decides"
        exact = smaller <= THIN_BELOW or 4 * (rank + OVERSAMPLING) > smaller
        return truncate(thin_svd(matrix), rank) if exact else randomised_svd(matrix, rank, seed)
    limit = smaller if rank is None else min(rank, smaller)
    return _holding(matrix, budget.keep, limit, seed)


def _holding(matrix: Tensor, keep: float, limit: int, seed: int) -> Decomposed:
    wanted = keep * float(matrix.double().square().sum())
    size = 32
    while min(matrix.shape) > THIN_BELOW and 4 * size <= min(matrix.shape):
        found = randomised_svd(matrix, size, seed)
        if float(found.values.square().sum()) >= wanted or size >= limit:
            return truncate(found, min(_first_reaching(found.values, wanted), limit))
        size *= 2
    found = thin_svd(matrix)
    return truncate(found, min(rank_keeping(found.values, keep), limit))


def _first_reaching(values: Tensor, energy: float) -> int:
    """The least rank whose values hold that much energy (all of them if none does); at least 1."""
    return max(min(int((values.square().cumsum(0) < energy).sum()) + 1, values.numel()), 1)


def _projected(dense: Tensor, basis: Tensor) -> Decomposed:
    """The SVD of basis · basisᵀ · dense, by way of the thin QR of its short, wide half."""
    outer, core = torch.linalg.qr(dense.T @ basis)  # (basisᵀ dense)ᵀ = outer · core
    left, values, right = torch.linalg.svd(core.T, full_matrices=False)
    return Decomposed(basis @ left, values, right @ outer.T)
