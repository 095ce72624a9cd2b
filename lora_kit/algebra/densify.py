"""Any update → the low-rank form nearest to it, with its error measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters import LoraUpdate, Update
from lora_kit.errors import AdapterFileError

WeightOf = Callable[[str], Tensor]
"""Dotted module name → the base's weight."""

_SHOWN = 5


@dataclass(frozen=True)
class Cut:
    """How much of each ΔW stays: a rank, or the least rank that keeps a share of the energy Σσ²."""

    rank: int | None = None
    keep: float = 0.99

    def of(self, energies: Tensor) -> int:
        """The rank for singular values whose squares are `energies`, largest first."""
        if self.rank is not None:
            return min(self.rank, len(energies))
        total = energies.cumsum(0)
        wanted = self.keep * float(total[-1])
        return min(int((total < wanted).sum()) + 1, len(energies))


class Densified(NamedTuple):
    """One module's low-rank form."""

    update: LoraUpdate
    error: float
    """‖ΔW − low-rank‖ in the Frobenius norm, of the factors as they are stored."""
    norm: float
    """‖ΔW‖."""

    @property
    def relative(self) -> float:
        """The error as a share of ΔW; 0 if nothing changes."""
        return self.error / self.norm if self.norm else 0.0


def densify(
    name: str, update: Update, cut: Cut, dtype: torch.dtype | None = None, weight_of: WeightOf | None = None
) -> Densified:
    """The best approximation of ΔW at strength 1 by `cut` (Eckart & Young 1936), in `dtype` (None: the update's own).

    One dense ΔW at a time, in float64: its singular vectors on the shorter side are the eigenvectors of the Gram
    matrix, good to √eps of the largest singular value, and what is kept is the projection of ΔW on them.
    Raises AdapterFileError for a change of norms or biases, which no such form holds, and where ΔW depends on the
    base's weight and there is no base.
    """
    delta = _delta(name, update, weight_of)
    matrix = delta.flatten(1)
    up, down = _factors(matrix, cut)
    stored = dtype or update.dtype
    rank = down.shape[0]
    kernel = (1,) * (delta.ndim - 2)
    lora = LoraUpdate(
        down.reshape(rank, *delta.shape[1:]).to(stored).contiguous(),
        up.reshape(up.shape[0], rank, *kernel).to(stored).contiguous(),
        float(rank),
    )
    error = matrix - lora.up.double().flatten(1) @ lora.down.double().flatten(1)
    return Densified(lora, float(error.norm()), float(matrix.norm()))


def total_error(found: Iterable[Densified]) -> float:
    """√Σ error² / √Σ norm² over all modules."""
    pairs = [(one.error, one.norm) for one in found]
    norm = math.hypot(*(norm for _, norm in pairs))
    return math.hypot(*(error for error, _ in pairs)) / norm if norm else 0.0


def densify_report(found: Mapping[str, Densified]) -> list[str]:
    """Lines that tell the error in all, and of the worst modules."""
    worst = sorted(found, key=lambda name: -found[name].relative)[:_SHOWN]
    ranks = sorted(one.update.rank for one in found.values())
    lines = [
        f"{len(found)} modules have a low-rank form now (rank {ranks[0]} to {ranks[-1]}): ‖ΔW − low-rank‖ / ‖ΔW‖ is "
        f"{total_error(found.values()):.2e} in all; worst:"
    ]
    return [*lines, *(f"  {found[name].relative:.2e}  rank {found[name].update.rank:4d}  {name}" for name in worst)]


def densified_metadata(metadata: Mapping[str, str], updates: Mapping[str, Update]) -> dict[str, str]:
    """The header of an adapter that is plain LoRA now: what sd-scripts' readers take from it."""
    if "ss_network_module" not in metadata:
        return dict(metadata)
    rank = Counter(update.rank for update in updates.values()).most_common(1)[0][0]
    facts = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    return {key: text for key, text in metadata.items() if key != "ss_network_args"} | facts


def _delta(name: str, update: Update, weight_of: WeightOf | None) -> Tensor:
    if update.needs_weight and weight_of is None:
        raise AdapterFileError(f"{name}: ΔW of {update.method} depends on the base's weight; name the base (--base)")
    weight = weight_of(name).double() if weight_of is not None and update.needs_weight else None
    delta = update.weight_delta(1.0, weight, torch.float64)
    bias = None if delta is None else update.bias_delta(1.0, torch.ones(delta.shape[0], dtype=torch.float64))
    if delta is None or delta.ndim < 2 or (bias is not None and bool(bias.any())):
        raise AdapterFileError(
            f"{name}: its {update.method} update changes more than a matrix (a norm, or a bias), which no low-rank "
            "form holds. Merge the adapter into its base instead (lora-kit merge), or keep kohya's layout."
        )
    return delta


def _factors(matrix: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """(up [out, r], down [r, in]) with equally large columns and rows."""
    turned = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if turned else matrix
    energies, vectors = torch.linalg.eigh(short @ short.T)
    energies, vectors = energies.flip(0).clamp(min=0.0), vectors.flip(1)
    rank = cut.of(energies)
    basis = vectors[:, :rank]
    rest = basis.T @ short
    size = rest.norm(dim=1, keepdim=True).sqrt()
    size[size == 0] = 1.0
    left, right = basis * size.T, rest / size
    return (right.T, left.T) if turned else (left, right)
