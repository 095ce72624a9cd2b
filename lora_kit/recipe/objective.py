"""The `objective:` section: what is minimised, with which noise, at which timesteps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_kit.errors import RecipeError
from lora_kit.recipe.base import Above0, AtLeast0, Fraction, Problem, Section, idle, refuse
from lora_kit.recipe.timesteps import TimestepSection, range_problems

_WEIGHTS = {
    "min_snr_gamma": None,
    "soft_min_snr_gamma": None,
    "debiased": False,
    "p2_gamma": None,
    "v_as_epsilon": False,
}
"""The loss weights, and the value that leaves each out."""


class ObjectiveSection(Section):
    """What is minimised."""

    loss: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """Distance between prediction and target. `l2`: the squared error that Stable Diffusion was trained with. `huber`,
    `smooth_l1` (sd-scripts' pseudo-Huber, Khrapov et al. 2024): squared near 0, absolute beyond `huber_c`, so that odd
    pictures pull less."""
    huber_c: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Error at which `huber` and `smooth_l1` turn from squared to absolute, in units of the noise's deviation. 0.1 is
    sd-scripts' default."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How that error depends on the timestep. `constant`: `huber_c`. `exponential`, `snr`: near 1 (squared) where there
    is little noise, falling to `huber_c` at the noisy end."""
    min_snr_gamma: Above0 | None = None
    """Min-SNR loss weight (Hang et al. 2023); 5 is the paper's. Default: plain mean over the timesteps."""
    soft_min_snr_gamma: Above0 | None = None
    """The same without its corner (Crowson et al. 2024); 4 is the paper's."""
    debiased: bool = False
    """Weight 1/√SNR on the noise's error (Yu et al. 2023): more of the noisy timesteps, against shifts of colour."""
    p2_gamma: Above0 | None = None
    """P2 weight 1/(k + SNR)^γ on the noise's error (Choi et al. 2022): less of the timesteps with little noise. 1 is
    the paper's, 0.5 its milder one."""
    p2_k: Above0 = 1.0
    """The k of `p2_gamma`; 1 is the paper's."""
    v_as_epsilon: bool = False
    """Weigh the error of v so that it is the noise's (sd-scripts' `scale_v_pred_loss_like_noise_pred`). Only for bases
    that predict v."""
    noise_offset: AtLeast0 = 0.0
    """Standard deviation of a per-channel constant added to the noise, for darker darks. 0.05 is usual."""
    adaptive_noise_scale: float = 0.0
    """Added to `noise_offset` for each channel, times the absolute mean of the picture's latents there (sd-scripts).
    Usually of the offset's size; below 0, flat pictures get less."""
    pyramid_levels: Annotated[int, Field(ge=0, le=16)] = 0
    """Multi-resolution noise (Whitaker 2023): grids of noise, each 2 to 4 times as coarse as the one before, that are
    added to the noise. 6 to 10 are usual; more than fit are not made. 0: plain noise."""
    pyramid_discount: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """What each coarser grid counts, to the power of its level. 0.3 suits adapters; 0.8 is strong."""
    input_perturbation: AtLeast0 = 0.0
    """Deviation γ of noise that the network's input has beyond the target's (Ning et al. 2023), against errors that
    build up while sampling. 0.1 is the paper's."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last timestep is noise alone (Lin et al. 2023): pictures can then be very
    dark or very bright. Only for bases that predict v or the clean latents. Pictures of the adapter need the same
    schedule: the run's own have it, the adapter's header says so, and `lora-kit generate` follows that."""
    timesteps: TimestepSection = TimestepSection()
    """Which timesteps are trained, and how often."""
    unmasked_weight: Fraction = 0.0
    """What the parts outside a picture's mask count, where it has one. Above 0 keeps them from drifting; the loss is
    divided by all weights' sum. Pictures without a mask count everywhere."""

    @model_validator(mode="after")
    def _agrees(self) -> ObjectiveSection:
        refuse("ObjectiveSection", _problems(self))
        return self


def weight_name(section: ObjectiveSection) -> str | None:
    """The field of the loss weight that is on; there is one at most."""
    return next(iter(_weights_on(section)), None)


def check_against_base(section: ObjectiveSection, base: str, prediction_type: str, timesteps: int) -> None:
    """Raise RecipeError, naming all of it, where the objective does not fit a base of this prediction and schedule.

    For what only the base's own config tells; the recipe's `model.prediction_type` is checked when it is read.
    """
    found = list(prediction_problems(section, prediction_type))
    for path, message in range_problems(section.timesteps, timesteps):
        found.append(Problem(("timesteps", *path), message))
    if found:
        head = f"The objective does not fit {base}, which predicts {prediction_type}:"
        lines = [f"  objective.{'.'.join(map(str, path))}: {message}" for path, message in found]
        raise RecipeError("\n".join([head, *lines]))


def prediction_problems(section: ObjectiveSection, prediction_type: str) -> Iterator[Problem]:
    """What the objective cannot do for a network that predicts this."""
    if section.zero_terminal_snr and prediction_type == "epsilon":
        said = (
            "`true` with a network that predicts the noise (epsilon): at the last timestep that is all of its input; "
            "there is nothing to learn, and a sampler would divide by 0. Remove it, or use a base that predicts v "
            "(`model.prediction_type: v_prediction` trains another one to)."
        )
        yield Problem(("zero_terminal_snr",), said)
    if section.v_as_epsilon and prediction_type != "v_prediction":
        said = f"`true` is for networks that predict v; this one predicts {prediction_type}. Remove it."
        yield Problem(("v_as_epsilon",), said)


def _weights_on(section: ObjectiveSection) -> list[str]:
    return [name for name, off in _WEIGHTS.items() if getattr(section, name) != off]


def _problems(section: ObjectiveSection) -> Iterator[Problem]:
    yield from _weight_problems(section)
    yield from _noise_problems(section)
    if section.loss not in ("huber", "smooth_l1"):
        why = f"does nothing with `loss: {section.loss}`; remove it, or use `loss: huber` or `smooth_l1`."
        yield from idle(section, ("huber_c", "huber_schedule"), why)


def _weight_problems(section: ObjectiveSection) -> Iterator[Problem]:
    on = _weights_on(section)
    for name in on[1:]:
        said = f"beside `{on[0]}`: each is a weight of its own for the whole of the timesteps; keep one."
        if name == "v_as_epsilon":
            said = f"beside `{on[0]}`, which is stated for v already; keep one."
        yield Problem((name,), said)
    if section.p2_gamma is None:
        yield from idle(section, ("p2_k",), "does nothing without `p2_gamma`; set that, or remove it.")


def _noise_problems(section: ObjectiveSection) -> Iterator[Problem]:
    if section.pyramid_levels:
        why = "beside `pyramid_levels`, whose coarsest grids do the same; keep one."
        yield from idle(section, ("noise_offset", "adaptive_noise_scale"), why)
    else:
        yield from idle(section, ("pyramid_discount",), "does nothing without `pyramid_levels`; set that.")
    if section.adaptive_noise_scale < 0 and not section.noise_offset:
        said = (
            f"got {section.adaptive_noise_scale}, which lessens a `noise_offset` of 0; set that, or make this above 0."
        )
        yield Problem(("adaptive_noise_scale",), said)
