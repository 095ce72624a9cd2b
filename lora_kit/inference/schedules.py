"""Pictures on the noise schedule that adapters were trained with, where the base's own config says another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_kit.adapters.formats.objective_header import TrainedSchedule, schedule_differences, trained_schedule
from lora_kit.models import ModelBundle
from lora_kit.models.loading import prediction_is_open
from lora_kit.models.schedules import ZERO_TERMINAL_SNR
from lora_kit.recipe import ModelSection


def follow_schedules(
    bundle: ModelBundle, files: Sequence[Path], headers: Sequence[Mapping[str, str]], asked: bool = False
) -> list[str]:
    """Put into the bundle what the files' headers say of prediction and schedule; what to tell of it.

    asked: the user said what the base predicts, which no file goes over.

    The first file that needs another schedule than the base's decides, for the base too: at strength 0 it is drawn on
    that schedule. Files that say otherwise are named.
    """
    warnings: list[str] = []
    decided: Path | None = None
    for path, header in zip(files, headers, strict=True):
        trained = trained_schedule(str(path), header)
        if asked and trained.prediction_type not in (None, bundle.prediction_type):
            said = f"{path}: was trained to predict {trained.prediction_type}"
            warnings.append(f"{said}; pictures are drawn as {bundle.prediction_type}, as asked")
            trained = trained._replace(prediction_type=None)
        zero = bool(bundle.scheduler_config.get("rescale_betas_zero_snr"))
        differing = schedule_differences(trained, bundle.prediction_type, zero)
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


def settle_prediction(
    section: ModelSection, files: Sequence[Path], headers: Sequence[Mapping[str, str]]
) -> tuple[ModelSection, list[str]]:
    """The base's section, and what to tell of it. A checkpoint that does not tell what it predicts is taken for what
    the adapters' headers say of the base they were trained on, if they agree; otherwise loading asks for it."""
    told = {path: trained_schedule(str(path), header) for path, header in zip(files, headers, strict=True)}
    says = {path: one.prediction_type for path, one in told.items() if one.prediction_type is not None}
    if len(set(says.values())) != 1 or not prediction_is_open(section):
        return section, []
    path, predicts = next(iter(says.items()))
    settled = section.model_copy(update={"prediction_type": predicts})
    told_of = f"{section.base} does not tell what it predicts: taken for {predicts}, as {path} was trained to predict"
    return settled, [told_of]


def _follow(bundle: ModelBundle, trained: TrainedSchedule) -> None:
    bundle.prediction_type = trained.prediction_type or bundle.prediction_type
    if trained.zero_terminal_snr:
        bundle.scheduler_config = {**bundle.scheduler_config, **ZERO_TERMINAL_SNR}
