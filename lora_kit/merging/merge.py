"""`merge` and `plan_merge`: adapters into the weights of a folder or a single file, and out of them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lora_kit.errors import AdapterFileError, LoraKitError, RecipeError
from lora_kit.merging.base import Base, open_base
from lora_kit.merging.publish import check_out, remove, write_merged
from lora_kit.merging.record import MERGED, check_unmerge, merged_metadata, record_of, unmerged_metadata
from lora_kit.merging.report import MergePlan, MergeReport, NetworkError, PlannedChange, PlannedUpdate
from lora_kit.merging.schedule import ScheduleChange, merged_schedule, restored_schedule
from lora_kit.merging.sources import Source, read_sources
from lora_kit.merging.stored import WeightFile, dtype_name
from lora_kit.merging.stream import Rewrite
from lora_kit.merging.verify import check_weights, distance, unmerge_bound
from lora_kit.merging.wanted import Parts, Scaled, Updates, all_parts, wanted_dtypes, wanted_parts, wanted_updates


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How to merge."""

    dtype: torch.dtype | None = None
    """Of the components that change; None: each weight keeps its own."""
    scales: Sequence[str] = ()
    """`glob=number` and block-weight strings, in order; they multiply every adapter's scale."""
    unmerge: bool = False
    """Subtract instead of add."""
    verify: bool = True
    """Recompute a sample of the written weights in float64."""
    verify_network: bool = False
    """Also run the networks: live adapters against the written weights. Loads both; takes minutes at SD1.5's size."""
    original: Path | None = None
    """For an un-merge: the base as it was, to compare with."""


class _Work(NamedTuple):
    """Everything that is known before the first byte is written."""

    base: Base
    adapters: list[Scaled]
    updates: Updates
    parts: Parts
    rewrites: list[Rewrite | None]
    """For each of the base's files; None: it is copied as it is."""
    schedule: ScheduleChange
    notes: list[str]


def merge(
    base: Path, adapters: Sequence[tuple[Source, float]], out: Path, options: MergeOptions | None = None
) -> MergeReport:
    """Write `base` with all adapters in its weights (`unmerge`: without them) to `out`, in the base's own layout.

    W + Σ ΔW is computed in fp32 and cast once, to `options.dtype` or the weight's own; every other tensor and file is
    copied byte for byte. The files are streamed: memory holds a few blocks of one tensor. `out` appears whole or not
    at all.

    Raises RecipeError for what is wrong about the arguments, AdapterFileError if an adapter does not fit, ModelError
    if the base cannot be read, a weight overflows its precision, or the result is not what it should be.
    """
    options = options or MergeOptions()
    check_out(base, out)
    work = _work(base, adapters, options)
    if options.verify_network and options.unmerge:
        raise RecipeError("--verify-network compares a merge with live adapters; an un-merge has none. Leave it out.")
    original = open_base(options.original) if options.original else None

    def inspect(written: list[WeightFile | None]) -> MergeReport:
        return _report(work, out, options, written)._replace(
            distance=distance(work.base, written, original) if original else None
        )

    report = write_merged(work.base, work.rewrites, out, inspect, work.schedule)
    return report._replace(networks=_networks(work, out)) if options.verify_network else report


def plan_merge(base: Path, adapters: Sequence[tuple[Source, float]], options: MergeOptions | None = None) -> MergePlan:
    """What `merge` would change; reads headers and adapters, writes nothing. Raises as `merge` does."""
    work = _work(base, adapters, options or MergeOptions())
    changes: list[PlannedChange] = []
    for (number, key), part in all_parts(work.parts):
        file, rewrite = work.base.files[number], work.rewrites[number]
        assert rewrite is not None, f"{file.path} changes, but is not written"
        changes.append(
            PlannedChange(
                part.module,
                part.kind,
                str(file.path.relative_to(base)) if work.base.is_folder else file.path.name,
                key,
                part.shape,
                dtype_name(rewrite.dtype_of(file.tensors[key])),
                tuple(PlannedUpdate(one.update.method, one.update.rank, one.scale) for one in part.updates),
            )
        )
    return MergePlan(tuple(changes), tuple(work.notes))


def _work(path: Path, adapters: Sequence[tuple[Source, float]], options: MergeOptions) -> _Work:
    base = open_base(path)
    sign = -1.0 if options.unmerge else 1.0
    states, notes = read_sources(base, [(source, sign * scale) for source, scale in adapters])
    if options.unmerge:
        _refuse_uninvertible(adapters, states)
    updates = wanted_updates(base, states, options.scales)
    parts = wanted_parts(base, updates)
    dtypes = wanted_dtypes(base, parts, options.dtype)
    records = [record_of(source, scale, options.scales) for source, scale in adapters]
    extend = unmerged_metadata if options.unmerge else merged_metadata
    changed = {number for number, _ in parts}
    headers = [file.metadata for number, file in enumerate(base.files) if number in changed]
    held = next((header for header in headers if MERGED in header), {})
    schedule = (
        restored_schedule(base, held, extend(held, records))
        if options.unmerge
        else merged_schedule(base, list(zip(_names(adapters), states, strict=True)))
    )
    rewrites: list[Rewrite | None] = []
    for number, file in enumerate(base.files):
        here = {key: some for (place, key), some in parts.items() if place == number}
        if not here and not dtypes[number] and file.path.suffix == ".safetensors":
            rewrites.append(None)
            continue
        metadata = schedule.header(extend(file.metadata, records)) if number in changed else file.metadata
        rewrites.append(Rewrite(file, here, dtypes[number], metadata))
    if options.unmerge:
        notes += check_unmerge(path, held, records)
    return _Work(base, states, updates, parts, rewrites, schedule, [*notes, *schedule.notes, *_notes(base)])


def _names(adapters: Sequence[tuple[Source, float]]) -> list[str]:
    return [source.name if isinstance(source, Path) else "the adapter" for source, _ in adapters]


def _refuse_uninvertible(adapters: Sequence[tuple[Source, float]], states: Sequence[Scaled]) -> None:
    """Raise AdapterFileError for updates that were computed from the weight before the merge, which is not here."""
    problems: list[str] = []
    for (source, _), (state, _) in zip(adapters, states, strict=True):
        methods = sorted({update.method for update in state.updates.values() if update.needs_weight})
        if methods:
            name = source if isinstance(source, Path) else "the adapter"
            problems.append(f"{name}: cannot be un-merged, as its ΔW ({', '.join(methods)}) depends on the weight")
    if problems:
        listed = "\n".join(problems)
        raise AdapterFileError(f"{listed}\nbefore the merge, which the merged weight does not tell. Keep the base.")


def _notes(base: Base) -> list[str]:
    """What else a user must know about the base's files."""
    notes: list[str] = []
    for files in base.components.values():
        left_out = [path.name for path in files.all_weights if path not in (*files.weights, files.shard_index)]
        if left_out:
            notes.append(f"{files.folder.name}: left out, not merged: {', '.join(left_out)}")
    for file in base.files:
        if file.path.suffix != ".safetensors":
            others = f"; left out, as it holds only tensors: {', '.join(file.others)}" if file.others else ""
            notes.append(f"{file.path.name} is written as safetensors{others}")
        if any(key.startswith("model_ema.") for key in file.tensors):
            notes.append(f"{file.path.name}: its averaged copies (model_ema.*) are kept as they are, not merged")
    return notes


def _report(work: _Work, out: Path, options: MergeOptions, written: list[WeightFile | None]) -> MergeReport:
    modules: dict[str, set[str]] = {}
    dtypes: dict[str, set[str]] = {}
    for (number, key), part in all_parts(work.parts):
        component, file = part.module.partition(".")[0], written[number]
        assert file is not None, f"{key} changes, but its file was not written"
        modules.setdefault(component, set()).add(part.module)
        dtypes.setdefault(component, set()).add(dtype_name(file.tensors[key].dtype))
    return MergeReport(
        out,
        {component: len(names) for component, names in modules.items()},
        {component: " and ".join(sorted(names)) for component, names in dtypes.items()},
        tuple(work.notes),
        check_weights(work.base, written, work.parts) if options.verify else None,
        unmerged=options.unmerge,
        bound=unmerge_bound(work.base, written, work.parts) if options.unmerge and options.verify else None,
    )


def _networks(work: _Work, out: Path) -> tuple[NetworkError, ...]:
    from lora_kit.merging.network import compare_networks  # here: it needs diffusers, whose import takes seconds

    try:
        return compare_networks(work.base.path, work.updates, out)
    except LoraKitError:
        remove(out)  # written by this very call
        raise
