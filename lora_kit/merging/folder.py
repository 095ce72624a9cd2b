"""Fuse adapters into a diffusers folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from lora_kit.adapters import AdapterState, read_adapter
from lora_kit.errors import RecipeError
from lora_kit.files import sync_folder, sync_tree
from lora_kit.merging.component import MergedComponent, merge_component
from lora_kit.merging.delta import ScaledUpdate
from lora_kit.merging.report import MergeReport, Verification
from lora_kit.merging.verify import adapted_outputs, add_in_place, check_weights, compare, fixed_outputs
from lora_kit.merging.weights import ComponentFiles, component_files
from lora_kit.models import load_bundle, skeleton
from lora_kit.recipe import ModelSection

Source = AdapterState | Path
States = list[tuple[AdapterState, float]]


def merge_folder(
    base: Path,
    adapters: Sequence[tuple[Source, float]],
    out: Path,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> MergeReport:
    """Write `base` (a diffusers folder) with all adapters fused at their scales to `out`.

    W + Σ ΔW is computed in fp32 and cast once, to `dtype` or the weight's own. Components that no adapter touches,
    and all other files, are copied byte for byte. `verify` compares the written folder with the live adapters on
    fixed inputs. `out` appears whole or not at all.

    Raises RecipeError if `out` cannot be written to, AdapterFileError if an adapter does not fit, ModelError if the
    base cannot be read, a weight overflows `dtype`, or the result is not what it should be.
    """
    _check_folders(base, out)
    networks = skeleton(_section(base)).components
    states: States = [(_state(source, networks), scale) for source, scale in adapters]
    wanted = _by_component(states)
    files = {component: component_files(base / component) for component in wanted}
    record = json.dumps([_record(source, scale) for source, scale in adapters], sort_keys=True)
    temporary = out.absolute().with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        _copy_rest(base, temporary, files.values())
        written = {
            component: merge_component(files[component], updates, temporary / component, dtype, record)
            for component, updates in wanted.items()
        }
        verification = _verify(base, states, wanted, temporary, written) if verify else None
        _publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return MergeReport(
        out,
        {component: len(updates) for component, updates in wanted.items()},
        {component: " and ".join(one.dtypes) for component, one in written.items()},
        tuple(one.note for one in written.values() if one.note),
        verification,
    )


def _check_folders(base: Path, out: Path) -> None:
    if base.is_file():
        raise RecipeError(
            f"{base}: is a single-file checkpoint; merging into one comes later. Give a diffusers folder: "
            "StableDiffusionPipeline.from_single_file(…).save_pretrained(…) makes one."
        )
    if not (base / "model_index.json").is_file():
        what = "has no model_index.json" if base.is_dir() else "does not exist"
        raise RecipeError(f"{base}: {what}; the base of a merge is a diffusers folder, or `tiny`")
    if out.resolve() == base.resolve() or base.resolve() in out.resolve().parents:
        raise RecipeError(f"{out}: is the base or inside it; name a new folder for the merged model")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out}: exists already and is not an empty folder; name a new one or remove it first")


def _section(folder: Path) -> ModelSection:
    return ModelSection(base=str(folder.absolute()), variant=component_files(folder / "unet").variant)


def _state(source: Source, networks: Mapping[str, nn.Module]) -> AdapterState:
    return read_adapter(source, networks) if isinstance(source, Path) else source


def _by_component(states: States) -> dict[str, dict[str, list[ScaledUpdate]]]:
    """Component → module → what is added to it. Adapters at scale 0 add nothing."""
    wanted: dict[str, dict[str, list[ScaledUpdate]]] = {}
    for state, scale in states:
        for name, update in state.updates.items() if scale else ():
            component = wanted.setdefault(name.partition(".")[0], {})
            component.setdefault(name, []).append(ScaledUpdate(update, scale))
    if not wanted:
        raise RecipeError("nothing to merge: no adapter was given at a scale other than 0")
    return wanted


def _record(source: Source, scale: float) -> dict[str, str | float]:
    """What the merged file's header says about one adapter."""
    if not isinstance(source, Path):
        return {"scale": scale, "sshs_model_hash": source.metadata.get("sshs_model_hash", "")}
    with source.open("rb") as file:
        return {"scale": scale, "file": source.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _copy_rest(base: Path, temporary: Path, replaced: Iterable[ComponentFiles]) -> None:
    """Copy all but the weight files that are replaced. Links are followed: a hub snapshot is made of them."""
    left_out = {path for files in replaced for path in files.all_weights}

    def ignore(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(folder) / name in left_out}

    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(base, temporary, ignore=ignore)


def _verify(
    base: Path,
    states: States,
    wanted: Mapping[str, Mapping[str, Sequence[ScaledUpdate]]],
    folder: Path,
    written: Mapping[str, MergedComponent],
) -> Verification:
    """Compare live adapters, the merge before its cast, and the written folder; all in fp32."""
    weights = check_weights({name: share for one in written.values() for name, share in one.shares.items()})
    components = list(wanted)
    bundle = load_bundle(_section(base))
    adapted = adapted_outputs(bundle, states, components)
    for updates in wanted.values():
        add_in_place(bundle.components, updates)
    exact = fixed_outputs(bundle, components)
    del bundle  # its memory is needed for the written one
    return Verification(compare(adapted, exact, fixed_outputs(load_bundle(_section(folder)), components)), weights)


def _publish(temporary: Path, out: Path) -> None:
    """Put the finished folder at `out` once all of it is on disk."""
    sync_tree(temporary)
    if out.exists():
        out.rmdir()
    temporary.rename(out)
    sync_folder(out.absolute().parent)
