"""`lora-kit extract`: the difference of two bases as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_kit.cli.options import DtypeName, refuse_existing, torch_dtype

if TYPE_CHECKING:
    from lora_kit.algebra.extract import Extracted

SHOWN = 8


def command(
    base: Annotated[str, typer.Argument(help="A diffusers folder, a single-file checkpoint, or `tiny`.")],
    tuned: Annotated[str, typer.Argument(help="The same after training, in either layout.")],
    out: Annotated[Path, typer.Option(help="The new file (kohya layout, diffusers' for LDM).")],
    rank: Annotated[int | None, typer.Option(help="Highest rank of a module.")] = None,
    keep: Annotated[float | None, typer.Option(help="Share of each module's energy Σσ² to keep, such as 0.95.")] = None,
    norms: Annotated[bool, typer.Option("--norms", help="Also differences of norm layers (LyCORIS keys).")] = False,
    biases: Annotated[bool, typer.Option("--biases", help="Also differences of biases (LyCORIS keys).")] = False,
    dtype: Annotated[DtypeName | None, typer.Option(help="Of the factors. Default: TUNED's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the randomised SVD.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, with every module.")] = False,
) -> None:
    """Write TUNED − BASE as a low-rank adapter: UNet and text encoder, every linear and convolution that differs.

    Both are read tensor by tensor; the error of every module is measured on what is written.
    """
    refuse_existing([out], overwrite)

    from lora_kit.adapters.state import AdapterState
    from lora_kit.algebra.extract import ExtractOptions, extract
    from lora_kit.algebra.extract_header import extracted_metadata
    from lora_kit.cli.ranks import base_path, budget_of, tell
    from lora_kit.cli.written import write_derived
    from lora_kit.progress import progress

    options = ExtractOptions(
        budget=budget_of(rank, keep),
        norms=norms,
        biases=biases,
        dtype=torch_dtype(dtype) if dtype else None,
        seed=seed,
    )
    paths = base_path(base), base_path(tuned)
    found = extract(*paths, options, progress)
    write_derived(out, AdapterState(found.updates, extracted_metadata(found, *paths, options)), found.family)
    tell(found.losses, _notes(found), out, as_json)


def _notes(found: Extracted) -> list[str]:
    notes = [f"{found.unchanged} parameters are equal in both"]
    if found.left_out:
        more = f" and {len(found.left_out) - SHOWN} more" if len(found.left_out) > SHOWN else ""
        notes.append(
            f"changed but left out (norms and biases: --norms, --biases; embeddings fit in no adapter): "
            f"{', '.join(found.left_out[:SHOWN])}{more}"
        )
    notes += [f"{component}: only one of the two holds it; not compared" for component in found.one_sided]
    return notes
