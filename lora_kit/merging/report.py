"""What a merge did, or would do, and how well: plain data, its text and its JSON form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


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
    error: float
    """Largest relative error of them: max |written - exact| / max |exact|."""
    cast: float
    """What rounding the exact weight to the written precision costs, for the same one."""
    worst: float
    """Largest error as a share of the bound that rounding allows; at most 1."""


class Distance(NamedTuple):
    """An un-merged base against the original."""

    tensors: int
    equal: int
    """How many of them are the original's bit for bit."""
    largest: float
    """max |difference| of the tensor that is relatively furthest."""
    relative: float
    """That, as a share of the tensor's largest value."""
    key: str


class MergeReport(NamedTuple):
    """What a merge did."""

    out: Path
    modules: dict[str, int]
    """Component → how many of its modules were changed."""
    dtypes: dict[str, str]
    """Component → the precision it was written in."""
    notes: tuple[str, ...]
    weights: WeightCheck | None
    networks: tuple[NetworkError, ...] = ()
    unmerged: bool = False
    bound: float | None = None
    """After an un-merge: how far rounding may have left it from the original, relative to a weight's largest value."""
    distance: Distance | None = None

    def text(self) -> str:
        """A few lines for the terminal."""
        done = "unmerged" if self.unmerged else "merged"
        lines = [
            f"{component}: {count} modules {done}, written in {self.dtypes[component]}"
            for component, count in self.modules.items()
        ]
        lines += [f"note: {note}" for note in self.notes]
        if self.weights is None:
            lines.append("not verified (--no-verify)")
        else:
            lines.append(
                f"{self.weights.modules} weights recomputed in float64: largest relative error "
                f"{self.weights.error:.2e} (the cast alone {self.weights.cast:.2e}), "
                f"{self.weights.worst:.2f} of what rounding allows"
            )
        for error in self.networks:
            lines.append(
                f"{error.component}: largest relative error against the live adapters {error.total:.2e} "
                f"(the cast alone {error.cast:.2e}, the arithmetic {error.arithmetic:.2e})"
            )
        if self.bound is not None:
            lines.append(
                f"at most {self.bound:.2e} from what it was before the merge, by rounding, relative to a weight's "
                "largest value (if the merge did not change the precision)"
            )
        if self.distance is not None:
            lines.append(_distance(self.distance))
        return "\n".join([*lines, f"wrote {self.out}"])

    def json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "out": str(self.out),
            "unmerged": self.unmerged,
            "modules": self.modules,
            "dtypes": self.dtypes,
            "notes": list(self.notes),
            "weights": self.weights and self.weights._asdict(),
            "networks": [error._asdict() for error in self.networks],
            "bound": self.bound,
            "distance": self.distance and self.distance._asdict(),
        }


class PlannedUpdate(NamedTuple):
    """One adapter's share in a planned change."""

    method: str
    rank: int | None
    scale: float
    """Final: the adapter's own times what the module's block was given."""


class PlannedChange(NamedTuple):
    """One line of what a merge would do."""

    module: str
    kind: str
    """`weight` or `bias`."""
    file: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    """The precision it would be written in."""
    updates: tuple[PlannedUpdate, ...]


class MergePlan(NamedTuple):
    """What `--dry-run` shows."""

    changes: tuple[PlannedChange, ...]
    notes: tuple[str, ...]

    def text(self) -> str:
        """A line for each change, and their count."""
        width = max(len(change.module) for change in self.changes)
        lines = [f"{'module':<{width}}  changes"]
        for change in self.changes:
            shares = " + ".join(_share(update) for update in change.updates)
            shape = " × ".join(map(str, change.shape))
            lines.append(
                f"{change.module:<{width}}  {change.kind} [{shape}] {change.dtype} += {shares}; "
                f"{change.key} in {change.file}"
            )
        lines += [f"note: {note}" for note in self.notes]
        modules = len({change.module for change in self.changes})
        return "\n".join([*lines, f"{modules} modules would change; nothing was written (--dry-run)"])

    def json(self) -> dict[str, Any]:
        """The same for programs."""
        changes = [
            {**change._asdict(), "updates": [update._asdict() for update in change.updates]} for change in self.changes
        ]
        return {"changes": changes, "notes": list(self.notes)}


def _share(update: PlannedUpdate) -> str:
    rank = "" if update.rank is None else f" r{update.rank}"
    return f"{update.scale:g} × {update.method}{rank}"


def _distance(found: Distance) -> str:
    same = f"against the original: {found.equal} of {found.tensors} tensors are equal bit for bit"
    if found.equal == found.tensors:
        return same
    if not found.key:
        return f"{same}, the others in value"
    return f"{same}; the largest difference is {found.largest:.2e}, {found.relative:.2e} of the largest of {found.key}"
