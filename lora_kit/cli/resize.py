"""`lora-kit resize`: an adapter at a lower rank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_kit.cli.options import DtypeName, refuse_existing, torch_dtype


def command(
    file: Annotated[Path, typer.Argument(help="An adapter of any layout that can be read.")],
    out: Annotated[Path, typer.Option(help="The new file (kohya layout, diffusers' for LDM).")],
    rank: Annotated[int | None, typer.Option(help="Highest rank of a module.")] = None,
    keep: Annotated[float | None, typer.Option(help="Share of each module's energy Σσ² to keep, such as 0.95.")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Of the new factors. Default: the file's.")] = None,
    base: Annotated[str | None, typer.Option(help="The base, where it is not SD1, SD2 or tiny.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, with every module.")] = False,
) -> None:
    """Cut FILE to a rank or to a share of its energy, each module by its own singular values; tell what it cost.

    Computed in float64 from the factors (QR, then an r × r SVD). A changed module is written with alpha = rank.
    """
    refuse_existing([out], overwrite)

    from lora_kit.adapters.state import AdapterState
    from lora_kit.algebra.lowrank_files import open_adapters, told_family
    from lora_kit.algebra.lowrank_header import derived_metadata
    from lora_kit.algebra.resize import resize
    from lora_kit.cli.ranks import budget_of, tell, token_notes
    from lora_kit.cli.written import write_derived
    from lora_kit.progress import progress

    budget = budget_of(rank, keep)
    (opened,) = open_adapters([file], base)
    resized = resize(opened.state.updates, budget, torch_dtype(dtype) if dtype else None, progress)
    record = {"file": file.name, "sha256": opened.sha256, "rank": rank, "keep": keep}
    metadata = derived_metadata([opened.state.metadata], resized.updates, "resized", record)
    write_derived(out, AdapterState(resized.updates, metadata), told_family(metadata, opened.base))
    notes = [f"{len(resized.kept)} modules were within it already and are kept as they are"] if resized.kept else []
    tell(resized.losses, [*notes, *token_notes([opened])], out, as_json)
