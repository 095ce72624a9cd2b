"""What a base says that it predicts, on which noise schedule, and what of it a merge has to change.

An adapter that was trained to predict v over a base whose config says otherwise is of no use in a folder that still
says so: the merged folder says what `generate` would have followed. An un-merge puts the base's own words back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from lora_kit.adapters.formats.objective_header import TrainedSchedule, schedule_differences, trained_schedule
from lora_kit.errors import ModelError
from lora_kit.files import write_text
from lora_kit.merging.base import Base
from lora_kit.merging.record import MERGED
from lora_kit.merging.wanted import Scaled
from lora_kit.models.schedules import ZERO_TERMINAL_SNR
from lora_kit.models.single_file import ldm_prediction

BEFORE = "lora_kit.scheduler_before"
"""Header key of a merged folder's weights: what the keys that the merge changed in scheduler_config.json said before,
as JSON; null for one that was not there."""
CONFIG = Path("scheduler") / "scheduler_config.json"


class ScheduleChange(NamedTuple):
    """What becomes of a base's schedule."""

    config: dict[str, Any] | None = None
    """The scheduler_config.json to write; None: the base's is copied."""
    before: Mapping[str, Any] = MappingProxyType({})
    """What the keys that change said until now; None for one that was not there."""
    notes: tuple[str, ...] = ()

    def header(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """`metadata` with BEFORE where the schedule is changed, and without it where no adapter is left."""
        kept = {key: value for key, value in metadata.items() if key != BEFORE or MERGED in metadata}
        if not self.before:
            return kept
        first = {**self.before, **(_read_before(kept) or {})}  # an earlier merge knows what the base itself said
        return {**kept, BEFORE: json.dumps(first, sort_keys=True)}

    def write(self, folder: Path) -> None:
        """Put the config in the place of the copied one, in diffusers' own form."""
        if self.config is not None:
            write_text(folder / CONFIG, json.dumps(self.config, indent=2, sort_keys=True) + "\n")


def said_schedule(base: Base) -> dict[str, Any] | None:
    """A folder's scheduler_config.json, whose `prediction_type` is `epsilon` where it names none, or what a single
    file says that it predicts. None where it does not.

    Raises ModelError for a scheduler_config.json that is damaged.
    """
    if base.is_folder:
        return _config(base.path / CONFIG)
    (file,) = base.files
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    if ldm_prediction.is_open(shapes, file.metadata):
        return None
    return {"prediction_type": ldm_prediction.told_by(file.metadata) or "epsilon"}


def merged_schedule(base: Base, adapters: Sequence[tuple[str, Scaled]]) -> ScheduleChange:
    """What merging the adapters, each with its name, does to the schedule: as `generate` has it, the first that was
    trained on another than the base's decides. Of a single file nothing is changed, only told."""
    said = said_schedule(base)
    if base.is_folder and said is None:
        return ScheduleChange()
    now, decided, notes = dict(said or {}), "", list[str]()
    for name, (state, _) in adapters:
        trained = trained_schedule(name, state.metadata)
        predicts = None if said is None else now.get("prediction_type", "epsilon")
        differing = schedule_differences(trained, predicts, bool(now.get("rescale_betas_zero_snr")))
        if not differing:
            continue
        told = f"{name} was trained {' and '.join(differing)}"
        wanted = now | _needed(trained)
        if base.is_folder and trained.binding and not decided and _is_possible(wanted):
            decided, now = name, wanted
            notes.append(f"{told}, and the base was not: the merged scheduler_config.json says so{_pndm(now)}")
        elif base.is_folder and _is_possible(wanted):
            notes.append(f"{told}, and the merged base is sampled as {decided or 'the base'}: that may be wrong for it")
        else:
            notes.append(f"{told}, which the merged base does not say: {'; '.join(_words(trained))}")
    if not decided or said is None:
        return ScheduleChange(notes=tuple(notes))
    before = {key: said.get(key) for key, value in now.items() if said.get(key) != value}
    return ScheduleChange(now, before, tuple(notes))


def restored_schedule(base: Base, metadata: Mapping[str, str], left: Mapping[str, str]) -> ScheduleChange:
    """What an un-merge does: once no adapter is left, what BEFORE tells is put back.

    metadata: the header of a file that changes, as it is; left: as it will be.
    """
    said = said_schedule(base)
    if not base.is_folder or said is None or BEFORE not in metadata or MERGED in left:
        return ScheduleChange()
    before = _read_before(metadata)
    if before is None:
        return ScheduleChange(notes=(f"{base.path}: its header's {BEFORE} cannot be read; check {CONFIG}",))
    gone = {key for key, value in before.items() if value is None}
    config = {key: value for key, value in {**said, **before}.items() if key not in gone}
    return ScheduleChange(config, notes=("the scheduler_config.json says again what it did before the merge",))


def _read_before(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """None where it is not what a merge writes."""
    try:
        read: Any = json.loads(metadata.get(BEFORE, "{}"))
    except ValueError:
        return None
    return cast("dict[str, Any]", read) if isinstance(read, dict) else None


def _needed(trained: TrainedSchedule) -> dict[str, Any]:
    predicts = {"prediction_type": trained.prediction_type} if trained.prediction_type else {}
    return predicts | (ZERO_TERMINAL_SNR if trained.zero_terminal_snr else {})


def _pndm(config: Mapping[str, Any]) -> str:
    """The sampler of SD's own folders knows nothing of zero terminal SNR."""
    cannot = config.get("_class_name") == "PNDMScheduler" and config.get("rescale_betas_zero_snr")
    return ", which diffusers' PNDM, its sampler, does not follow: use DDIM" if cannot else ""


def _is_possible(config: Mapping[str, Any]) -> bool:
    """The noise cannot be predicted where it is all of the input."""
    return not config.get("rescale_betas_zero_snr") or config.get("prediction_type", "epsilon") != "epsilon"


def _words(trained: TrainedSchedule) -> Iterator[str]:
    """How to use what does not say it itself."""
    if trained.prediction_type:
        yield f"use it with model.prediction_type: {trained.prediction_type} (generate: --prediction-type)"
    if trained.zero_terminal_snr:
        yield "sample it with rescale_betas_zero_snr=True and timestep_spacing='trailing' in its scheduler's config"


def _config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        read: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}): fetch it again.") from error
    if not isinstance(read, dict):
        raise ModelError(f"{path} is no table of a scheduler's settings: fetch it again.")
    return cast("dict[str, Any]", read)
