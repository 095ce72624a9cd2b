"""What `combine`, `resize` and `extract` share. Import it only when a command runs: it imports torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from torch import Tensor

from lora_kit.adapters.formats.objective_header import trained_schedule
from lora_kit.algebra.extract_source import open_parameters
from lora_kit.algebra.lowrank import Budget
from lora_kit.algebra.lowrank_files import OpenedAdapter
from lora_kit.algebra.lowrank_report import ModuleLoss, loss_document, loss_lines
from lora_kit.algebra.lowrank_updates import Weights
from lora_kit.errors import AdapterFileError
from lora_kit.models.outline import TINY_FOLDER


def budget_of(rank: int | None, keep: float | None) -> Budget:
    """Raises RecipeError for neither, or values that make no sense."""
    return Budget(rank=rank, keep=keep)


def tell(losses: Sequence[ModuleLoss], notes: Sequence[str], out: Path, as_json: bool) -> None:
    """The table of losses, or one JSON document, on stdout."""
    if as_json:
        document = {"out": str(out), "notes": list(notes), **loss_document(losses)}
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    typer.echo("\n".join([*(loss_lines(losses) if losses else []), *notes, f"wrote {out}"]))


def token_notes(opened: Sequence[OpenedAdapter]) -> list[str]:
    """A note for each file with learned tokens, which belong to no module and are not written."""
    return [
        f"{one.path.name}: its learned tokens ({', '.join(one.state.embeddings)}) are left out; "
        "`lora-kit convert --tokens` saves them"
        for one in opened
        if one.state.embeddings
    ]


def schedule_notes(opened: Sequence[OpenedAdapter]) -> list[str]:
    """A note where the files' headers do not agree on what is predicted on which schedule: the result names none."""
    told = {one.path.name: trained_schedule(str(one.path), one.state.metadata) for one in opened}
    if len({(one.prediction_type, one.zero_terminal_snr) for one in told.values() if one.prediction_type}) < 2:
        return []
    zero = {False: "", True: " with zero terminal SNR"}
    listed = ", ".join(f"{name} {one.prediction_type}{zero[one.zero_terminal_snr]}" for name, one in told.items())
    return [f"the files were trained to predict different things ({listed}), so the result's header names none"]


def base_weights(base: str | None) -> Weights | None:
    """Weights of a base by module name, each mapped when it is asked for; None without a base."""
    if base is None:
        return None
    parameters = open_parameters(base_path(base))

    def weight(name: str) -> Tensor:
        if f"{name}.weight" not in parameters.shapes:
            raise AdapterFileError(f"{name}: {base} has no such weight")
        return parameters.read(f"{name}.weight")

    return weight


def base_path(base: str) -> Path:
    """`tiny` → the packaged base's folder; everything else is a path."""
    return TINY_FOLDER if base == "tiny" else Path(base).expanduser()
