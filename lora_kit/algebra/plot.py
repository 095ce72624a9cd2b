"""A picture of an adapter: which blocks it moves, and how its spectra fall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kit.algebra.inspection import Inspection
from lora_kit.algebra.spectrum import UpdateSpectrum, block_of
from lora_kit.files import write_atomically

COLOURS = {"text encoder": "#2a7f62", "unet down": "#35618f", "unet mid": "#8a5a9e", "unet up": "#c06a2b"}
OTHER_COLOUR = "#777777"
LEAST_SHOWN = 1e-5


def draw_inspection(found: Inspection, path: Path) -> None:
    """Write a PNG, whole or not at all: norms per block, and every module's singular values over their largest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window system, no global state
    from matplotlib.figure import Figure

    height = max(4.2, 1.6 + 0.26 * len(found.blocks))
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{found.path.name}   ‖ΔW‖ = {found.norm:.4g} at strength 1", fontsize=12)
    left, right = figure.subplots(1, 2)
    _draw_blocks(left, found)
    _draw_spectra(right, found)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _draw_blocks(axes: Any, found: Inspection) -> None:
    names = [one.block for one in found.blocks]
    norms = [one.norm for one in found.blocks]
    bars = axes.barh(names, norms, color=[_colour(name) for name in names])
    axes.bar_label(bars, [f"{one.share:.1%}" for one in found.blocks], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title("norm per block (and share of the energy)", fontsize=10)
    axes.set_xlabel("‖ΔW‖ (Frobenius)")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_spectra(axes: Any, found: Inspection) -> None:
    """One thin line a module, and per kind of block the mean as a thick one."""
    axes.set_title("singular values over the largest (thin: modules, thick: mean)", fontsize=10)
    axes.set_xlabel("index")
    axes.set_yscale("log")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    groups: dict[str, list[list[float]]] = {}
    for one in found.spectra:
        if falling := _relative(one):
            groups.setdefault(_kind(block_of(one.module)), []).append(falling)
    for kind, curves in groups.items():
        for curve in curves:
            axes.plot(range(1, len(curve) + 1), curve, color=_colour(kind), alpha=0.12, linewidth=0.7)
        mean = _mean(curves)
        label = f"{kind} ({len(curves)})"
        axes.plot(range(1, len(mean) + 1), mean, color=_colour(kind), linewidth=2.2, label=label, marker="o", ms=3)
    if groups:
        least = min(value for curves in groups.values() for curve in curves for value in curve)
        axes.set_ylim(max(least / 1.5, LEAST_SHOWN), 1.5)
        axes.legend(fontsize=8, frameon=False, loc="upper right")


def _relative(one: UpdateSpectrum) -> list[float]:
    """σ / σ₁, without what is zero to rounding; nothing for an update that is zero or was not looked at."""
    if not one.singular_values or one.singular_values[0] == 0:
        return []
    shares = [value / one.singular_values[0] for value in one.singular_values]
    return [share for share in shares if share > 1e-9]


def _mean(curves: list[list[float]]) -> list[float]:
    """At each index, over the curves that reach it."""
    longest = max(len(curve) for curve in curves)
    columns = [[curve[index] for curve in curves if index < len(curve)] for index in range(longest)]
    return [sum(column) / len(column) for column in columns]


def _kind(block: str) -> str:
    return next((kind for kind in COLOURS if block.startswith(kind)), "unet")


def _colour(block: str) -> str:
    return COLOURS.get(_kind(block), OTHER_COLOUR)
