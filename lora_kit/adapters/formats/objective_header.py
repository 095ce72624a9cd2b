"""What an adapter's header says of the objective it was trained with, and of the noise schedule its pictures need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lora_kit.errors import AdapterFileError

if TYPE_CHECKING:
    from lora_kit.recipe import ObjectiveSection

SCHEDULER_KEY = "lora_kit.scheduler"

# sd-scripts' name (train_network.py) → ours. Written where it is on.
_SS = {
    "ss_min_snr_gamma": "min_snr_gamma",
    "ss_debiased_estimation": "debiased",
    "ss_noise_offset": "noise_offset",
    "ss_adaptive_noise_scale": "adaptive_noise_scale",
    "ss_multires_noise_iterations": "pyramid_levels",
    "ss_ip_noise_gamma": "input_perturbation",
}
_MODELSPEC_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


class TrainedSchedule(NamedTuple):
    """What a header says of the schedule that sampling has to follow. None: nothing."""

    prediction_type: str | None
    zero_terminal_snr: bool
    binding: bool
    """Whether the file itself depends on it: written by lora_kit, or trained with zero terminal SNR. Other tools' word
    on the prediction alone may be the default of whoever wrote the file."""


def objective_metadata(section: ObjectiveSection, scheduler: Mapping[str, Any]) -> dict[str, str]:
    """`ss_*` keys as sd-scripts' readers look for, of what is on, and `lora_kit.scheduler`.

    scheduler: what a sampler's config must have beyond the base's own.
    """
    from lora_kit.recipe import ObjectiveSection  # here: a merge reads headers and needs no recipe

    defaults = ObjectiveSection()
    values: dict[str, object] = {
        name: getattr(section, field)
        for name, field in _SS.items()
        if getattr(section, field) != getattr(defaults, field)
    }
    values["ss_loss_type"] = section.loss
    if section.loss in ("huber", "smooth_l1"):
        values |= {"ss_huber_schedule": section.huber_schedule, "ss_huber_c": section.huber_c}
    if section.pyramid_levels:
        values["ss_multires_noise_discount"] = section.pyramid_discount
    if scheduler.get("rescale_betas_zero_snr"):
        values["ss_zero_terminal_snr"] = True
    if scheduler:
        values[SCHEDULER_KEY] = json.dumps(dict(scheduler), sort_keys=True)
    return {key: str(value) for key, value in values.items()}


def modelspec_prediction(prediction_type: str) -> str:
    """The ModelSpec's word for what the network predicts."""
    return {ours: word for word, ours in _MODELSPEC_PREDICTIONS.items()}.get(prediction_type, prediction_type)


def trained_schedule(file: str, metadata: Mapping[str, str]) -> TrainedSchedule:
    """Raises AdapterFileError, which names `file`, where `lora_kit.scheduler` is not what lora_kit writes."""
    if SCHEDULER_KEY in metadata:
        own = _own_scheduler(file, metadata[SCHEDULER_KEY])
        return TrainedSchedule(own.get("prediction_type"), bool(own.get("rescale_betas_zero_snr")), binding=True)
    told = _MODELSPEC_PREDICTIONS.get(metadata.get("modelspec.prediction_type", "")) or _by_sd_scripts(metadata)
    zero = metadata.get("ss_zero_terminal_snr") == "True"
    return TrainedSchedule(told, zero, binding=zero)


def schedule_differences(trained: TrainedSchedule, prediction_type: str | None, zero_terminal_snr: bool) -> list[str]:
    """In which a base of this schedule (prediction type None: it does not say) is another than the file's, in words
    that follow "was trained"."""
    found: list[str] = []
    if trained.prediction_type not in (None, prediction_type):
        found.append(f"to predict {trained.prediction_type}")
    if trained.zero_terminal_snr and not zero_terminal_snr:
        found.append("with zero terminal SNR")
    return found


def _by_sd_scripts(metadata: Mapping[str, str]) -> str | None:
    """sd-scripts' name of the base: `sd_v1`, `sd_v2`, and `_v` behind it for --v_parameterization."""
    version = metadata.get("ss_base_model_version", "")
    return {"sd_v1": "epsilon", "sd_v2": "epsilon", "sd_v1_v": "v_prediction", "sd_v2_v": "v_prediction"}.get(version)


def _own_scheduler(file: str, text: str) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except ValueError:
        read = None
    own = cast("dict[str, Any]", read) if isinstance(read, dict) else {"prediction_type": read}
    if own.get("prediction_type") not in (None, *_MODELSPEC_PREDICTIONS.values()) or read is None:
        raise AdapterFileError(
            f"{file}: its header's {SCHEDULER_KEY} is {text[:80]!r}; it should be JSON such as "
            '{"prediction_type": "v_prediction"}. The file was changed by something else; take the original.'
        )
    return own
