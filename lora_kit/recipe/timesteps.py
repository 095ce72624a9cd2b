"""The `objective.timesteps:` section: how much noise the pictures are trained with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_kit.recipe.base import Above0, NonNegative, Problem, Section, idle, refuse

_OF_DISTRIBUTION = {
    "logit_normal": ("logit_mean", "logit_std"),
    "mode": ("mode_scale",),
    "later": ("bias_portion", "bias_factor"),
    "earlier": ("bias_portion", "bias_factor"),
    "band": ("bias_band", "bias_factor"),
}
"""The fields that only some distributions read."""


class TimestepSection(Section):
    """Which timesteps are trained. 0 has the least noise; Stable Diffusion has 0 … 999."""

    min: NonNegative = 0
    """First timestep that is trained. Above 0 leaves fine detail as the base has it."""
    max: NonNegative | None = None
    """Last timestep that is trained, inclusive. Default: the schedule's last (999). Below that leaves the layout of
    pictures as the base makes it."""
    distribution: Literal["uniform", "logit_normal", "mode", "cubic", "later", "earlier", "band"] = "uniform"
    """How often each timestep of `min` … `max` is drawn. `logit_normal`, `mode` (Esser et al. 2024): more of the
    middle. `cubic` (T2I-Adapter): more of the noisy ones. `later`, `earlier`, `band` (SimpleTuner): one part more often
    than the rest, which is drawn evenly."""
    logit_mean: float = 0.0
    """`logit_normal`: above 0, more of the noisy timesteps. 0 is even-handed."""
    logit_std: Above0 = 1.0
    """`logit_normal`: smaller keeps closer to the middle. 1 is the paper's best."""
    mode_scale: Annotated[float, Field(ge=-1, le=2 / (math.pi - 2))] = 1.29
    """`mode`: 0 is uniform, below 0 draws more of both ends. 1.29 is the paper's best."""
    bias_portion: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """`later`: the noisiest part of the range that is drawn more often; `earlier`: the least noisy one."""
    bias_band: tuple[NonNegative, NonNegative] | None = Field(default=None, strict=False)
    """`band`: first and last timestep, inclusive, of those that are drawn more often."""
    bias_factor: Above0 = 2.0
    """`later`, `earlier`, `band`: how many times as often as the other timesteps. Below 1: more rarely."""
    stratified: bool = False
    """Let the pictures of each optimizer step, over all processes, share the distribution out: of n, one is drawn from
    each n-th part of it. The loss varies less from step to step. What a picture is given still derives from (seed,
    step, place in the step), whatever the micro-batches."""

    @model_validator(mode="after")
    def _agrees(self) -> TimestepSection:
        refuse("TimestepSection", _timestep_problems(self))
        return self


def range_problems(section: TimestepSection, count: int) -> Iterator[Problem]:
    """What is wrong with the section on a schedule of `count` timesteps; paths as in the section."""
    found = {"min": section.min, "max": section.max, "bias_band": section.bias_band and section.bias_band[1]}
    for name, timestep in found.items():
        if timestep is not None and timestep >= count:
            yield Problem((name,), f"got {timestep}, but the base's schedule has the timesteps 0 … {count - 1}.")


def _timestep_problems(section: TimestepSection) -> Iterator[Problem]:
    if section.max is not None and section.max < section.min:
        yield Problem(("max",), f"got {section.max}, below `min` = {section.min}; no timestep is left.")
    reads = _OF_DISTRIBUTION.get(section.distribution, ())
    others = {name for names in _OF_DISTRIBUTION.values() for name in names} - {*reads}
    why = f"does nothing with `distribution: {section.distribution}`; remove it, or use one that reads it."
    yield from idle(section, tuple(sorted(others)), why)
    if section.distribution == "band":
        yield from _band_problems(section)


def _band_problems(section: TimestepSection) -> Iterator[Problem]:
    if section.bias_band is None:
        yield Problem(("bias_band",), "needed with `distribution: band`, such as `bias_band: [200, 500]`.")
        return
    first, last = section.bias_band
    if not section.min <= first <= last or (section.max is not None and last > section.max):
        top = "the last timestep" if section.max is None else f"`max` = {section.max}"
        said = f"got [{first}, {last}]; must be two timesteps in order, from `min` = {section.min} to {top}."
        yield Problem(("bias_band",), said)
