"""`lora-kit inspect`: what is in an adapter file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_kit.errors import RecipeError

if TYPE_CHECKING:
    from lora_kit.algebra.inspection import Inspection
    from lora_kit.algebra.spectrum import UpdateSpectrum

SHOWN_MODULES = 12
SHOWN_TEXT = 100
SHARE_BAR = 24


def command(
    file: Annotated[Path, typer.Argument(help="An adapter of any layout that can be read.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw blocks and spectra to this PNG.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Look at methods without factors too (slow).")] = False,
    base: Annotated[str | None, typer.Option(help="Where ΔW depends on its weights, or it is not SD1 or SD2.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the PNG if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, with every module.")] = False,
) -> None:
    """Show layout, base, methods and ranks, what the updates do at strength 1, which blocks moved, and the header."""
    if plot is not None and plot.exists() and not overwrite:
        raise RecipeError(f"{plot} exists already; name another place or pass --overwrite")

    from lora_kit.algebra.inspection import inspect_file
    from lora_kit.cli.ranks import base_weights

    found = inspect_file(file, base, dense, base_weights(base))
    if plot is not None:
        from lora_kit.algebra.plot import draw_inspection

        draw_inspection(found, plot)
    if as_json:
        typer.echo(json.dumps(_document(found), indent=2, ensure_ascii=False))
        return
    sections = [_summary(found), _embeddings(found), _blocks(found), _table(found), _header(found.metadata)]
    typer.echo("\n\n".join("\n".join(section) for section in sections if section))
    if plot is not None:
        typer.echo(f"\nwrote {plot}")


def _document(found: Inspection) -> dict[str, Any]:
    return {
        "layout": found.layout,
        "family": found.family,
        "fits": found.fits,
        "misfit": found.misfit,
        "norm": found.norm,
        "blocks": [one._asdict() for one in found.blocks],
        "modules": [one._asdict() for one in found.spectra],
        "embeddings": {token: list(shape) for token, shape in found.embeddings.items()},
        "unknown_keys": list(found.unknown),
        "metadata": found.metadata,
    }


def _summary(found: Inspection) -> list[str]:
    parameters = sum(one.parameters for one in found.spectra)
    groups = Counter((_component(one), one.method, one.rank, one.alpha, one.dtype) for one in found.spectra)
    fits = found.fits or "none that is known by heart (--base names one)"
    lines = [
        f"{found.path.name}: {found.layout} layout, {len(found.spectra)} modules, {parameters:,} parameters",
        f"  base: the header says {found.family or 'nothing'}; names and shapes fit {fits}",
    ]
    for (component, method, rank, alpha, dtype), count in sorted(groups.items(), key=str):
        size = "" if rank is None else f", rank {rank}"
        strength = "" if alpha is None else f", alpha {alpha:g}"
        lines.append(f"  {component}: {count} × {method}{size}{strength}, {dtype}")
    if found.unknown:
        keys = ", ".join(found.unknown)
        lines.append(f"  {len(found.unknown)} keys that are no part of an update: {_short(keys)}")
    return lines


def _embeddings(found: Inspection) -> list[str]:
    rows = [f"  {token}: {list(shape)}" for token, shape in found.embeddings.items()]
    return ["learned tokens:", *rows] if rows else []


def _blocks(found: Inspection) -> list[str]:
    """Where the adapter moves the network."""
    if not found.blocks:
        return []
    most = max(one.share for one in found.blocks)
    lines = [f"block            modules  ‖ΔW‖      share of the whole energy (‖ΔW‖ = {found.norm:.4g})"]
    for one in found.blocks:
        bar = "█" * round(SHARE_BAR * one.share / most) if most else ""
        lines.append(f"{one.block:<15}  {one.modules:7d}  {one.norm:<8.3g}  {one.share:6.1%}  {bar}".rstrip())
    return lines


def _table(found: Inspection) -> list[str]:
    """The modules with the largest updates."""
    largest = sorted(found.spectra, key=lambda one: -(one.norm or 0.0))[:SHOWN_MODULES]
    width = max((len(one.module) for one in largest), default=6)
    lines = [f"{'largest updates':<{width}}  rank  effective  95 %  99 %  ‖ΔW‖      singular values"]
    lines += [_row(one, width) for one in largest]
    if len(found.spectra) > len(largest):
        lines.append(f"… and {len(found.spectra) - len(largest)} more (--json shows all)")
    notes = Counter(one.note for one in found.spectra if one.note)
    return [*lines, *(f"{count} modules not looked at: {note}" for note, count in notes.items())]


def _row(one: UpdateSpectrum, width: int) -> str:
    values = "  ".join(f"{value:.3g}" for value in one.singular_values[:4])
    effective = "–" if one.effective_rank is None else f"{one.effective_rank:.1f}"
    norm = "–" if one.norm is None else f"{one.norm:.3g}"
    ranks = "  ".join(f"{'–' if rank is None else rank:>4}" for rank in (one.rank_95, one.rank_99))
    rank = "–" if one.rank is None else one.rank
    return f"{one.module:<{width}}  {rank:>4}  {effective:>9}  {ranks}  {norm:<8}  {values}".rstrip()


def _header(metadata: dict[str, str]) -> list[str]:
    return [
        "header:" if metadata else "header: none",
        *(f"  {key}: {_short(metadata[key])}" for key in sorted(metadata)),
    ]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_TEXT else f"{line[:SHOWN_TEXT]}… ({len(text)} characters)"


def _component(one: UpdateSpectrum) -> str:
    return "text encoder" if one.module.startswith(("lora_te", "text_encoder")) else "UNet"
