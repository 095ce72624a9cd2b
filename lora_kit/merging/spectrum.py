"""What an adapter's updates look like, without ever making ΔW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from lora_kit.adapters.formats.layout import RawUpdate
from lora_kit.errors import AdapterFileError


class UpdateSpectrum(NamedTuple):
    """ΔW = (alpha / rank) · up · down of one module, at strength 1."""

    module: str
    """In the file's spelling."""
    rank: int
    alpha: float
    dtype: str
    down_shape: tuple[int, ...]
    up_shape: tuple[int, ...]
    frobenius: float
    """√Σ ΔW²."""
    singular_values: tuple[float, ...]
    """All of them, largest first."""


def spectrum(module: str, raw: RawUpdate) -> UpdateSpectrum:
    """Singular values of ΔW from the r × r core.

    With up = Q₁R₁ and downᵀ = Q₂R₂ (thin QR), ΔW = Q₁ (R₁R₂ᵀ) Q₂ᵀ and the Q's are orthogonal, so ΔW has the
    singular values of R₁R₂ᵀ. Raises AdapterFileError if a half is missing or the ranks disagree.
    """
    if raw.down is None or raw.up is None or raw.down.ndim < 2 or raw.up.ndim < 2:
        raise AdapterFileError(f"{module}: a half of the update is missing or is no matrix")
    down, up = raw.down.double().flatten(1), raw.up.double().flatten(1)
    rank = down.shape[0]
    if up.shape[1] != rank or rank == 0:
        raise AdapterFileError(f"{module}: the ranks of down ({rank}) and up ({up.shape[1]}) do not agree")
    alpha = float(rank) if raw.alpha is None else raw.alpha
    core = torch.linalg.qr(up, "r").R @ torch.linalg.qr(down.T, "r").R.T * (alpha / rank)
    if not bool(torch.isfinite(core).all()):
        raise AdapterFileError(f"{module}: the update holds NaN or infinite values")
    values: list[float] = torch.linalg.svdvals(core).tolist()
    return UpdateSpectrum(
        module,
        rank,
        alpha,
        str(raw.down.dtype).removeprefix("torch."),
        tuple(raw.down.shape),
        tuple(raw.up.shape),
        float(core.norm()),
        tuple(values),
    )


def spectra(updates: Mapping[str, RawUpdate]) -> list[UpdateSpectrum]:
    """`spectrum` of every module, by name."""
    return [spectrum(module, updates[module]) for module in sorted(updates)]
