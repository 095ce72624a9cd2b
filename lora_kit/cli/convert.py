"""`lora-kit convert`: an adapter in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_kit.cli.options import DtypeName, refuse_existing, torch_dtype
from lora_kit.errors import AdapterFileError, RecipeError

if TYPE_CHECKING:
    import torch

    from lora_kit.adapters import AdapterState, RawAdapter
    from lora_kit.algebra.densify import Cut, WeightOf

SHOWN = 10


def command(
    file: Annotated[Path, typer.Argument(help="An adapter: a .safetensors file of any layout, or PEFT's folder.")],
    to: Annotated[Literal["kohya", "diffusers", "peft"], typer.Option(help="The layout to write.")],
    out: Annotated[Path, typer.Option(help="New file; for peft a new folder.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base, for its module names. Default: Stable Diffusion 1 or 2, whichever fits."),
    ] = None,
    captions: Annotated[
        bool, typer.Option("--captions/--no-captions", help="Carry tag statistics and folder names over.")
    ] = True,
    densify: Annotated[
        bool, typer.Option("--densify", help="Write a low-rank form of what the layout cannot hold; tells its error.")
    ] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="With --densify: the rank of those modules.")] = None,
    keep: Annotated[float | None, typer.Option(help="With --densify: the share of ΔW's energy to keep. 0.99")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Cast to this. Default: as stored, bit for bit.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="New folder for learned tokens that came with the file.")] = None,
) -> None:
    """Write FILE in another layout, bit for bit, or say why that layout cannot hold it."""
    cut = _cut(densify, rank, keep)
    refuse_existing([path for path in (out, tokens) if path is not None], overwrite=False)

    from lora_kit.adapters import read_raw, write_adapter

    raw = read_raw(file)
    state = _state(file, raw, base, to)
    wanted = torch_dtype(dtype) if dtype else None
    state, said = _holdable(state, to, cut, wanted, base)
    _check_tokens(state, to, tokens)
    write_adapter(out, state._replace(embeddings={}) if tokens is not None else state, to, wanted, captions)
    if tokens is not None:
        _write_tokens(tokens, state)
    how = f"cast to {dtype}" if dtype else "those not named below bit for bit" if said else "bit for bit"
    typer.echo("\n".join([f"{file} ({raw.layout.name}) → {out} ({to}): {len(state.updates)} modules, {how}", *said]))


def _cut(densify: bool, rank: int | None, keep: float | None) -> Cut | None:
    if not densify and (rank is not None or keep is not None):
        raise RecipeError("--rank and --keep say how to --densify; pass it too, or leave them out")
    if rank is not None and keep is not None:
        raise RecipeError("--rank and --keep exclude each other")
    if keep is not None and not 0 < keep <= 1:
        raise RecipeError(f"--keep: got {keep}; allowed: a share of the energy, above 0 and up to 1")
    if not densify:
        return None
    from lora_kit.algebra.densify import Cut

    return Cut(rank) if keep is None else Cut(rank, keep)


def _state(file: Path, raw: RawAdapter, base: str | None, to: str) -> AdapterState:
    """The adapter under module names: those of the base, or of the first known one that it fits. Raises
    AdapterFileError where `to` has no names for that base's family."""
    from lora_kit.algebra.lowrank_files import fitting_base, told_family
    from lora_kit.models.adapter_layouts import kohya_problem

    name, state = fitting_base(file, raw, base)
    if to == "kohya" and (why := kohya_problem(told_family(raw.metadata, name))) is not None:
        raise AdapterFileError(f"{file}: {why} Nothing was written.")
    return state


def _holdable(
    state: AdapterState, to: str, cut: Cut | None, dtype: torch.dtype | None, base: str | None
) -> tuple[AdapterState, list[str]]:
    """The adapter as `to` can hold it, and what is to be told about it."""
    from lora_kit.adapters import refusals

    problems = refusals(state, to)
    if not problems:
        return state, []
    if cut is None:
        raise AdapterFileError(_refusal(to, problems))
    from lora_kit.algebra.densify import densified_metadata, densify, densify_report

    weights = _weights(base) if base is not None else None
    typer.echo(f"densifying {len(problems)} modules", err=True)
    found = {name: densify(name, state.updates[name], cut, dtype, weights) for name in problems}
    updates = state.updates | {name: one.update for name, one in found.items()}
    metadata = densified_metadata(state.metadata, updates)
    return state._replace(updates=updates, metadata=metadata), densify_report(found)


def _refusal(to: str, problems: dict[str, str]) -> str:
    lines = [f"{to}'s layout cannot hold {len(problems)} of the updates; nothing was written:"]
    lines += [f"  {name}: {reason}" for name, reason in list(problems.items())[:SHOWN]]
    lines += [f"  … and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n".join([*lines, "Keep it in kohya's layout (--to kohya), or pass --densify for a low-rank form."])


def _weights(base: str) -> WeightOf:
    """The base's own weights by module name."""
    import torch

    from lora_kit.models.loading import open_layout
    from lora_kit.recipe import ModelSection

    # Neither the tokenizer nor what the network predicts matters here, and a single file may say neither.
    with open_layout(ModelSection(base=base, prediction_type="epsilon")) as layout:
        components = {"unet": layout.unet(torch.float32), "text_encoder": layout.text_encoder(torch.float32)}

    def weight_of(name: str) -> torch.Tensor:
        component, _, inner = name.partition(".")
        return components[component].get_parameter(f"{inner}.weight").detach()

    return weight_of


def _check_tokens(state: AdapterState, to: str, folder: Path | None) -> None:
    if state.embeddings and folder is None and to != "kohya":
        raise AdapterFileError(
            f"the file also has learned tokens ({', '.join(state.embeddings)}), which {to}'s layout does not hold. "
            "Pass --tokens FOLDER to write each into a file of its own, for `load_textual_inversion`."
        )
    if folder is not None and not state.embeddings:
        raise AdapterFileError("--tokens: the file has no learned tokens; leave the option out")


def _write_tokens(folder: Path, state: AdapterState) -> None:
    """One file a token, under the token as its key: what diffusers' `load_textual_inversion` reads."""
    from lora_kit.adapters.formats.container import write_safetensors
    from lora_kit.recipe.tokens import file_stem

    for token, vectors in state.embeddings.items():
        write_safetensors(folder / f"{file_stem(token)}.safetensors", {token: vectors}, {})
