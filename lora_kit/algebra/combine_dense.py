"""Merging rules that act on the entries of ΔW: TIES and DARE. One dense module at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The `density` share of entries that are largest in magnitude; the rest zero (Yadav et al. 2023, section 3.1).

    Of entries that are equal in magnitude at the threshold all stay. At least one entry stays.
    """
    drop = delta.numel() - max(round(density * delta.numel()), 1)
    if drop <= 0:
        return delta
    threshold = delta.abs().flatten().kthvalue(drop + 1).values
    return torch.where(delta.abs() >= threshold, delta, torch.zeros_like(delta))


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES-merging: trim, elect sign, disjoint mean (Yadav et al. 2023, "TIES-Merging", algorithm 1).

    τ̂ᵢ = wᵢ · trim(ΔWᵢ); the sign of an entry is that of Σ τ̂ᵢ (the side with the larger summed magnitude); the
    entry is the mean of those τ̂ᵢ that are not zero and have this sign. Equal weights λ are the paper's λ · τ. Where
    weights differ they count in the election too. Trimming is per module, as in PEFT; the paper's own
    experiments trim a whole model at once.
    """
    terms = torch.stack([weight * trimmed(delta, density) for delta, weight in zip(deltas, weights, strict=True)])
    elected = terms.sum(dim=0).sign()
    agrees = (terms.sign() == elected) & (terms != 0)
    return torch.where(agrees, terms, 0.0).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)


def dare(delta: Tensor, density: float, seed: int, key: str) -> Tensor:
    """DARE: drop entries at random, rescale the others by 1 / density (Yu et al. 2023, "Language Models are Super
    Mario", section 3.2), so that the mean over draws is ΔW.

    density: the chance of an entry to stay, 1 − p in the paper. The draw is of (seed, key) alone.
    """
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    stays = torch.rand(delta.shape, generator=generator) < density
    return torch.where(stays, delta / density, 0.0)
