"""`lora-kit merge`: adapters into a base's weights, or out of them, with the result verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lora_kit.cli.options import DtypeName, parse_adapter, torch_dtype
from lora_kit.errors import RecipeError

_TINY = Path(__file__).parent.parent / "assets" / "tiny_base"  # as in models.loading, which imports diffusers


def command(
    base: Annotated[str, typer.Argument(help="A diffusers folder, a .safetensors or .ckpt file, or `tiny`.")],
    adapter: Annotated[list[str], typer.Option(help="FILE or FILE:SCALE. May be given several times.")],
    out: Annotated[
        Path | None, typer.Option(help="The merged base, new: a folder for a folder, a .safetensors file for a file.")
    ] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Of the merged components. Default: the base's.")] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=NUMBER, multiplies the adapters' scale where it matches; the last match decides."),
    ] = None,
    block_weights: Annotated[
        str | None, typer.Option(help="17 or 26 numbers with commas between, as in sd-webui-lora-block-weight.")
    ] = None,
    unmerge: Annotated[bool, typer.Option("--unmerge", help="Subtract adapters that are in BASE.")] = False,
    original: Annotated[
        Path | None, typer.Option(help="With --unmerge: BASE before the merge, to compare with exactly.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Recompute a sample of the weights in float64.")
    ] = True,
    verify_network: Annotated[
        bool, typer.Option("--verify-network", help="Also run the networks, live adapters against merged. Slow.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would change; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Write BASE with the adapters in its weights. Computed in fp32, cast once; all else is copied bit for bit."""
    adapters = [parse_adapter(text) for text in adapter]
    _check(out, dry_run, unmerge, original)

    from lora_kit.merging.merge import MergeOptions, merge, plan_merge

    options = MergeOptions(
        dtype=torch_dtype(dtype) if dtype else None,
        scales=[*([block_weights] if block_weights else []), *(scale or [])],
        unmerge=unmerge,
        verify=verify,
        verify_network=verify_network,
        original=original,
    )
    folder = _TINY if base == "tiny" else Path(base)
    sources = [(option.path, option.scale) for option in adapters]
    result = plan_merge(folder, sources, options) if dry_run or out is None else merge(folder, sources, out, options)
    typer.echo(json.dumps(result.json(), indent=2, ensure_ascii=False) if as_json else result.text())


def _check(out: Path | None, dry_run: bool, unmerge: bool, original: Path | None) -> None:
    if out is None and not dry_run:
        raise RecipeError("--out: is missing; name the new folder or file, or pass --dry-run to see what would change")
    if original is not None and not unmerge:
        raise RecipeError("--original: goes with --unmerge; a merge is not compared with what it started from")
