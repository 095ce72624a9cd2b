"""`lora-kit merge`: fuse adapters into a base's weights, and verify the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_kit.cli.options import DtypeName, parse_adapter, torch_dtype


def command(
    base: Annotated[str, typer.Argument(help="A diffusers folder, or `tiny`.")],
    adapter: Annotated[list[str], typer.Option(help="FILE or FILE:SCALE. May be given several times.")],
    out: Annotated[Path, typer.Option(help="New folder for the merged base.")],
    dtype: Annotated[DtypeName | None, typer.Option(help="Of the merged weights. Default: the base's.")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare with the live adapters.")] = True,
) -> None:
    """Write BASE with the adapters fused into its weights. Computed in fp32, cast once; the rest is copied."""
    adapters = [parse_adapter(text) for text in adapter]

    from lora_kit.merging import merge_folder
    from lora_kit.models.loading import TINY, TINY_FOLDER

    folder = TINY_FOLDER if base == TINY else Path(base)
    typer.echo("merging, then verifying in fp32" if verify else "merging", err=True)
    sources = [(option.path, option.scale) for option in adapters]
    report = merge_folder(folder, sources, out, torch_dtype(dtype) if dtype else None, verify)
    typer.echo(report.text())
