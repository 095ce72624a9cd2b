"""What writing a module at another rank cost: plain data, sums over modules, and the text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

WORST = 8


class ModuleLoss(NamedTuple):
    """One module, before and after."""

    module: str
    old_rank: int | None
    """None: it had no low-rank form."""
    rank: int
    norm: float
    """‖ΔW‖ (Frobenius) before."""
    lost: float
    """√Σ σ² of the singular values that were dropped."""
    error: float
    """‖ΔW − what is written‖, measured on the written factors: the truncation and the cast to their dtype."""

    @property
    def kept_energy(self) -> float:
        """1 − lost² / norm²; 1 for an update that is zero."""
        return 1 - (self.lost / self.norm) ** 2 if self.norm else 1.0

    @property
    def relative_error(self) -> float:
        """error / norm; 0 for an update that is zero."""
        return self.error / self.norm if self.norm else 0.0


class TotalLoss(NamedTuple):
    """All modules taken as one long vector."""

    modules: int
    kept_energy: float
    relative_error: float


def total_loss(losses: Sequence[ModuleLoss]) -> TotalLoss:
    """Σ over modules of the squares, then the shares."""
    norm = math.fsum(one.norm**2 for one in losses)
    if norm == 0:
        return TotalLoss(len(losses), 1.0, 0.0)
    lost = math.fsum(one.lost**2 for one in losses)
    error = math.fsum(one.error**2 for one in losses)
    return TotalLoss(len(losses), 1 - lost / norm, math.sqrt(error / norm))


def loss_lines(losses: Sequence[ModuleLoss]) -> list[str]:
    """Ranks before → after with their kept energy, the modules that lost most, and the whole."""
    total = total_loss(losses)
    return [
        *_rank_table(losses),
        "",
        *_worst_table(losses),
        "",
        f"in all: {total.modules} modules, kept energy {total.kept_energy:.6f}, "
        f"relative error {total.relative_error:.2e} (the dtype's rounding included)",
    ]


def _rank_table(losses: Sequence[ModuleLoss]) -> list[str]:
    groups = Counter((one.old_rank or 0, one.rank) for one in losses)
    lines = ["rank            modules  kept energy (least … mean)"]
    for (old, new), count in sorted(groups.items()):
        kept = [one.kept_energy for one in losses if (one.old_rank or 0, one.rank) == (old, new)]
        change = f"{old or 'dense'} → {new}"
        lines.append(f"{change:<14}  {count:7d}  {min(kept):.4f} … {math.fsum(kept) / count:.4f}")
    return lines


def _worst_table(losses: Sequence[ModuleLoss]) -> list[str]:
    worst = sorted(losses, key=lambda one: (-one.relative_error, one.module))[:WORST]
    width = max((len(one.module) for one in worst), default=6)
    lines = [f"{'largest errors':<{width}}  rank         ‖ΔW‖      lost      relative error"]
    for one in worst:
        change = f"{one.old_rank or 'dense'} → {one.rank}"
        lines.append(
            f"{one.module:<{width}}  {change:<11}  {one.norm:<8.3g}  {one.lost:<8.3g}  {one.relative_error:.2e}"
        )
    return lines


def loss_document(losses: Sequence[ModuleLoss]) -> dict[str, object]:
    """The same for `--json`."""
    modules = [one._asdict() | {"kept_energy": one.kept_energy, "relative_error": one.relative_error} for one in losses]
    return {"modules": modules, "total": total_loss(losses)._asdict()}
