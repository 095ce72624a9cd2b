"""What a merge did, and how well: plain data and its text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class NetworkError(NamedTuple):
    """Largest relative errors of one component's output on fixed inputs: max |a - b| / max |b|."""

    component: str
    total: float
    """The written network against the base with live adapters in fp32."""
    arithmetic: float
    """The merge before its cast against the live adapters: rounding of fp32 alone."""
    cast: float
    """The written network against the merge before its cast: what storing in this precision costs."""


class WeightCheck(NamedTuple):
    """A sample of merged weights against float64."""

    modules: int
    worst: float
    """Largest error as a share of the bound that rounding allows; at most 1."""


class Verification(NamedTuple):
    """How a merge was checked."""

    networks: tuple[NetworkError, ...]
    weights: WeightCheck


class MergeReport(NamedTuple):
    """What a merge did."""

    out: Path
    modules: dict[str, int]
    """Component → how many of its weights were changed."""
    dtypes: dict[str, str]
    """Component → the precision it was written in."""
    notes: tuple[str, ...]
    verification: Verification | None

    def text(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{component}: {count} weights merged, written in {self.dtypes[component]}"
            for component, count in self.modules.items()
        ]
        lines += [f"note: {note}" for note in self.notes]
        if self.verification is None:
            return "\n".join([*lines, "not verified (--no-verify)", f"wrote {self.out}"])
        for error in self.verification.networks:
            lines.append(
                f"{error.component}: largest relative error against the live adapters {error.total:.2e} "
                f"(the cast alone {error.cast:.2e}, the arithmetic {error.arithmetic:.2e})"
            )
        check = self.verification.weights
        lines.append(
            f"{check.modules} weights recomputed in float64: worst error {check.worst:.2f} of what rounding allows"
        )
        return "\n".join([*lines, f"wrote {self.out}"])
