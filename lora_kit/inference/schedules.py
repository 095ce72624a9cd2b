"""Pictures on the noise schedule that adapters were trained with, where the base's own config says another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_kit.adapters.formats.objective_header import TrainedSchedule, trained_schedule
from lora_kit.models import ModelBundle
from lora_kit.models.pipelines import ZERO_TERMINAL_SNR


def follow_schedules(bundle: ModelBundle, files: Sequence[Path], headers: Sequence[Mapping[str, str]]) -> list[str]:
    """Put into the bundle what the files' headers say of prediction and schedule; what to tell of it.

    The first file that needs another schedule than the base's decides, for the base too: at strength 0 it is drawn on
    that schedule. Files that say otherwise are named.
    """
    warnings: list[str] = []
    decided: Path | None = None
    for path, header in zip(files, headers, strict=True):
        trained = trained_schedule(str(path), header)
        differing = _differences(bundle, trained)
        if not differing:
            continue
        said = f"{path}: was trained {' and '.join(differing)}"
        if not trained.binding or decided is not None:
            follows = f"as {decided} was" if decided is not None else "as the base's config says"
            warnings.append(f"{said}; pictures are drawn {follows}, which may be wrong for it")
            continue
        decided = path
        _follow(bundle, trained)
        warnings.append(f"{said}, which {bundle.source} by its config was not; pictures follow the adapter")
    return warnings


def _differences(bundle: ModelBundle, trained: TrainedSchedule) -> list[str]:
    found: list[str] = []
    if trained.prediction_type not in (None, bundle.prediction_type):
        found.append(f"to predict {trained.prediction_type}")
    if trained.zero_terminal_snr and not bundle.scheduler_config.get("rescale_betas_zero_snr"):
        found.append("with zero terminal SNR")
    return found


def _follow(bundle: ModelBundle, trained: TrainedSchedule) -> None:
    bundle.prediction_type = trained.prediction_type or bundle.prediction_type
    if trained.zero_terminal_snr:
        bundle.scheduler_config = {**bundle.scheduler_config, **ZERO_TERMINAL_SNR}
