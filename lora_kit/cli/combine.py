"""`lora-kit combine`: several adapters as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_kit.cli.options import DtypeName, parse_adapter, refuse_existing, torch_dtype

MethodName = Literal["concat", "svd", "ties", "dare"]


def command(
    files: Annotated[list[str], typer.Argument(metavar="FILE[:WEIGHT]…", help="Adapters of one base.")],
    out: Annotated[Path, typer.Option(help="The new file (kohya layout, diffusers' for LDM).")],
    method: Annotated[MethodName, typer.Option(help="concat: exact; svd: cut to a rank; ties, dare.")] = "concat",
    rank: Annotated[int | None, typer.Option(help="Highest rank of a module.")] = None,
    keep: Annotated[float | None, typer.Option(help="Share of each module's energy Σσ² to keep, such as 0.95.")] = None,
    density: Annotated[float, typer.Option(help="ties, dare: share of the entries that stay.")] = 0.5,
    seed: Annotated[int, typer.Option(help="dare: of the draw.")] = 0,
    dtype: Annotated[DtypeName | None, typer.Option(help="Of the factors. Default: the widest of the files.")] = None,
    base: Annotated[str | None, typer.Option(help="Where ΔW depends on its weights, or it is not SD1 or SD2.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, with every module.")] = False,
) -> None:
    """Write Σ WEIGHT · ΔW of all FILEs as one adapter: exactly, at the summed rank, unless a rank is asked."""
    wanted = [parse_adapter(text, "FILE[:WEIGHT]") for text in files]
    refuse_existing([out], overwrite)

    from lora_kit.adapters.state import AdapterState
    from lora_kit.algebra.combine import CombineOptions, combine
    from lora_kit.algebra.lowrank_files import open_adapters, told_family
    from lora_kit.algebra.lowrank_header import derived_metadata
    from lora_kit.cli.ranks import base_weights, budget_of, schedule_notes, tell, token_notes
    from lora_kit.cli.written import write_derived
    from lora_kit.progress import progress

    options = CombineOptions(
        method=method,
        budget=None if rank is None and keep is None else budget_of(rank, keep),
        density=density,
        seed=seed,
        dtype=torch_dtype(dtype) if dtype else None,
    )
    opened = open_adapters([option.path for option in wanted], base)
    pairs = [(one.state, option.scale) for one, option in zip(opened, wanted, strict=True)]
    combined = combine(pairs, options, base_weights(base), progress)
    sources = [
        {"file": one.path.name, "sha256": one.sha256, "weight": option.scale}
        for one, option in zip(opened, wanted, strict=True)
    ]
    record = {"method": method, "rank": rank, "keep": keep, "sources": sources}
    if method in ("ties", "dare"):
        record |= {"density": density} | ({"seed": seed} if method == "dare" else {})
    metadata = derived_metadata([one.state.metadata for one in opened], combined.updates, "combined", record)
    write_derived(out, AdapterState(combined.updates, metadata), told_family(metadata, opened[0].base))
    tell(combined.losses, [*token_notes(opened), *schedule_notes(opened)], out, as_json)
