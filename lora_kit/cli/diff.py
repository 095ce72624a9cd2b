"""`lora-kit diff`: two adapters side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lora_kit.algebra.compare import Comparison, ModulePair

SHOWN = 12


def command(
    first: Annotated[Path, typer.Argument(metavar="A", help="An adapter of any layout that can be read.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another of the same base.")],
    base: Annotated[str | None, typer.Option(help="Where ΔW depends on its weights, or it is not SD1 or SD2.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, with every module.")] = False,
) -> None:
    """Compare what A and B do to each module at strength 1: cosine of the two ΔW, ratio of their norms."""
    from lora_kit.algebra.compare import compare_adapters
    from lora_kit.algebra.lowrank_files import open_adapters
    from lora_kit.cli.ranks import base_weights

    opened = open_adapters([first, second], base)
    found = compare_adapters(opened[0].state, opened[-1].state, base_weights(base))
    if as_json:
        typer.echo(json.dumps(_document(found), indent=2, ensure_ascii=False))
    else:
        layouts = [one.layout for one in opened]
        typer.echo("\n".join(_lines(first, second, layouts, found)))


def _document(found: Comparison) -> dict[str, Any]:
    return {
        "modules": [_row(pair) for pair in found.pairs],
        "in_all": _row(found.shared) if found.pairs else None,
        "only_first": list(found.only_first),
        "only_second": list(found.only_second),
        "not_compared": found.not_compared,
    }


def _row(pair: ModulePair) -> dict[str, Any]:
    return pair._asdict() | {"cosine": pair.cosine, "ratio": pair.ratio}


def _lines(first: Path, second: Path, layouts: Sequence[str], found: Comparison) -> list[str]:
    lines = [f"A = {first} ({layouts[0]}), B = {second} ({layouts[-1]})"]
    if found.pairs:
        shown = sorted(found.pairs, key=lambda pair: (pair.cosine is not None, pair.cosine or 0.0))[:SHOWN]
        width = max(len(pair.module) for pair in [*shown, found.shared])
        lines += [f"{'least alike':<{width}}  cosine    ‖B‖/‖A‖   ‖A−B‖/‖A‖  ‖A‖"]
        lines += [_line(pair, width) for pair in shown]
        if len(found.pairs) > len(shown):
            lines.append(f"… and {len(found.pairs) - len(shown)} more (--json shows all)")
        lines.append(_line(found.shared, width))
    lines.append(
        f"{len(found.pairs)} modules in both, {len(found.only_first)} only in A, {len(found.only_second)} only in B"
    )
    lines += _listed("only in A", found.only_first) + _listed("only in B", found.only_second)
    return lines + _listed("not compared", [f"{name}: {why}" for name, why in found.not_compared.items()])


def _line(pair: ModulePair, width: int) -> str:
    difference = pair.difference / pair.first_norm if pair.first_norm else None
    numbers = [_number(pair.cosine, "+.5f"), _number(pair.ratio, ".4g"), _number(difference, ".3g")]
    return f"{pair.module:<{width}}  {numbers[0]:<8}  {numbers[1]:<8}  {numbers[2]:<9}  {pair.first_norm:.3g}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _listed(title: str, names: Sequence[str]) -> list[str]:
    more = [f"  … and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{title}:", *(f"  {name}" for name in names[:SHOWN]), *more] if names else []
