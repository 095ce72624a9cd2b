"""`lora-kit inspect`: what is in an adapter file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lora_kit.adapters import RawAdapter
    from lora_kit.merging import UpdateSpectrum

SHOWN_MODULES = 12
SHOWN_TEXT = 100


def command(
    file: Annotated[Path, typer.Argument(help="An adapter (.safetensors).")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, with every module.")] = False,
) -> None:
    """Show layout, base, ranks, the size of the updates at strength 1, and the header. Needs no base."""
    from lora_kit.adapters import read_raw
    from lora_kit.merging import spectra

    raw = read_raw(file)
    found = spectra(raw.parts.updates)
    if as_json:
        typer.echo(json.dumps(_document(raw, found), indent=2, ensure_ascii=False))
    else:
        typer.echo("\n".join([*_summary(file, raw, found), "", *_table(found), "", *_header(raw.metadata)]))


def _document(raw: RawAdapter, found: Sequence[UpdateSpectrum]) -> dict[str, Any]:
    from lora_kit.adapters import family_of

    return {
        "layout": raw.layout.name,
        "family": family_of(raw.metadata),
        "modules": [one._asdict() for one in found],
        "unknown_keys": list(raw.parts.unknown),
        "metadata": raw.metadata,
    }


def _summary(file: Path, raw: RawAdapter, found: Sequence[UpdateSpectrum]) -> list[str]:
    from lora_kit.adapters import family_of

    parameters = sum(_size(one) for one in found)
    groups = Counter((_component(one.module), one.rank, one.alpha, one.dtype) for one in found)
    lines = [
        f"{file.name}: {raw.layout.name} layout, base {family_of(raw.metadata) or 'not said'}, "
        f"{len(found)} modules, {parameters:,} parameters"
    ]
    lines += [
        f"  {component}: {count} modules of rank {rank}, alpha {alpha:g}, {dtype}"
        for (component, rank, alpha, dtype), count in sorted(groups.items())
    ]
    if raw.parts.unknown:
        lines.append(f"  {len(raw.parts.unknown)} keys that are no part of an update: {_short(str(raw.parts.unknown))}")
    return lines


def _table(found: Sequence[UpdateSpectrum]) -> list[str]:
    """The modules with the largest updates."""
    largest = sorted(found, key=lambda one: -one.frobenius)[:SHOWN_MODULES]
    width = max((len(one.module) for one in largest), default=6)
    lines = [f"{'largest updates':<{width}}  rank  ‖ΔW‖      singular values"]
    for one in largest:
        values = "  ".join(f"{value:.3g}" for value in one.singular_values[:4])
        lines.append(f"{one.module:<{width}}  {one.rank:4d}  {one.frobenius:<8.3g}  {values}")
    if len(found) > len(largest):
        lines.append(f"… and {len(found) - len(largest)} more (--json shows all)")
    return lines


def _header(metadata: dict[str, str]) -> list[str]:
    return [
        "header:" if metadata else "header: none",
        *(f"  {key}: {_short(metadata[key])}" for key in sorted(metadata)),
    ]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_TEXT else f"{line[:SHOWN_TEXT]}… ({len(text)} characters)"


def _component(module: str) -> str:
    return "text encoder" if module.startswith(("lora_te", "text_encoder")) else "UNet"


def _size(one: UpdateSpectrum) -> int:
    return prod(one.down_shape) + prod(one.up_shape)
