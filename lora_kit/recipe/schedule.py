"""The `schedule:` section: learning rate over time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_kit.recipe.base import Fraction, NonNegative, Positive, Problem, Section, refuse, shown
from lora_kit.recipe.optimizer import OptimizerSection

ScheduleName = Literal[
    "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "piecewise_constant"
]
_ONLY_FOR = {
    "decay_steps": ("constant",),
    "cycles": ("cosine_with_restarts",),
    "power": ("polynomial",),
    "floor": ("linear", "cosine", "polynomial"),
    "timescale": ("inverse_sqrt",),
    "step_rules": ("piecewise_constant",),
}
_RULES = re.compile(r"([0-9.eE+-]+:[0-9]+,)*[0-9.eE+-]+")


class ScheduleSection(Section):
    """Learning rate over time: a factor on every rate, the same for all modules."""

    name: ScheduleName = "constant"
    """After the warm-up: stay; or fall by `train.max_steps` along a line, half a cosine, `cycles` half cosines that
    each start from the peak, or a power of what is left; or fall as 1/√step; or by `step_rules`. Names and curves as
    in diffusers and transformers."""
    warmup_steps: NonNegative = 0
    """Optimizer steps over which the rate rises linearly from zero."""
    decay_steps: NonNegative = 0
    """Last optimizer steps of a `constant` schedule, over which the rate falls linearly to zero (Hu et al. 2024,
    "warmup-stable-decay": the end of the run can be moved without changing what came before)."""
    cycles: Positive = 1
    """Half cosines of `cosine_with_restarts` (Loshchilov & Hutter 2017)."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of `polynomial`; 1 is a line."""
    floor: Fraction = 0.0
    """Where `linear`, `cosine` and `polynomial` end, as a share of the peak rate."""
    timescale: Positive | None = None
    """Steps over which `inverse_sqrt` falls by 1/√2 after the warm-up. Default: `warmup_steps`, or 10000 without."""
    step_rules: str | None = None
    """Factors of `piecewise_constant` and the steps that they last until, as in diffusers: `"1:10,0.1:20,0.01"` is 1
    for the first 10 steps, 0.1 until step 20, then 0.01."""
    rewarm_steps: NonNegative = 0
    """When a run is resumed: optimizer steps over which the rate rises linearly again to where the schedule is. A ramp
    that was begun goes on after another resume; a new number begins a new one. 0: the rate goes on where it was."""

    @model_validator(mode="after")
    def _agrees(self) -> ScheduleSection:
        refuse("ScheduleSection", _own_problems(self))
        return self

    def pieces(self) -> tuple[list[tuple[int, float]], float]:
        """`step_rules` as [(until this step, factor), …] and the last factor."""
        *rules, last = (self.step_rules or "1").split(",")
        pairs = [rule.split(":") for rule in rules]
        return [(int(until), float(factor)) for factor, until in pairs], float(last)


def schedule_problems(schedule: ScheduleSection, optimizer: OptimizerSection, max_steps: int) -> Iterator[Problem]:
    """What is wrong between the schedule, the optimizer and the run's length."""
    if schedule.warmup_steps > max_steps:
        said = f"got {schedule.warmup_steps}, but the run ends after `train.max_steps` = {max_steps}"
        yield Problem(("schedule", "warmup_steps"), f"{said}, before the warm-up. Make this at most {max_steps}.")
    elif schedule.warmup_steps + schedule.decay_steps > max_steps:
        left = max_steps - schedule.warmup_steps
        said = f"got {schedule.decay_steps}, but {left} steps are left after the warm-up"
        yield Problem(("schedule", "decay_steps"), f"{said} (`train.max_steps` = {max_steps}). Make this at most that.")
    if optimizer.is_schedule_free:
        yield from _schedule_free_problems(schedule, optimizer)
    if schedule.warmup_steps and optimizer.args.get("safeguard_warmup") is False and optimizer.is_prodigy:
        said = "Prodigy's estimate suffers from a warm-up without it (its authors' advice); remove it or the warm-up"
        yield Problem(("optimizer", "args", "safeguard_warmup"), f"got false with `schedule.warmup_steps`: {said}.")


def _schedule_free_problems(schedule: ScheduleSection, optimizer: OptimizerSection) -> Iterator[Problem]:
    if schedule.name != "constant" or schedule.decay_steps:
        key = "name" if schedule.name != "constant" else "decay_steps"
        said = f"`{optimizer.name}` averages weights in place of a falling rate"
        yield Problem(("schedule", key), f"{said}; use `name: constant` without `decay_steps` (a warm-up may stay).")
    if "warmup_steps" in optimizer.args:
        yield Problem(("optimizer", "args", "warmup_steps"), "is set by `schedule.warmup_steps`; write it there.")


def _own_problems(section: ScheduleSection) -> Iterator[Problem]:
    fields = type(section).model_fields
    for key, names in _ONLY_FOR.items():
        if getattr(section, key) == fields[key].default or section.name in names:
            continue
        why = ", which falls to zero by itself" if key == "decay_steps" else f"; it is of {', '.join(names)}"
        yield Problem((key,), f"does nothing with `name: {section.name}`{why}; remove it.")
    if section.name == "piecewise_constant":
        yield from _rule_problems(section)


def _rule_problems(section: ScheduleSection) -> Iterator[Problem]:
    text = (section.step_rules or "").replace(" ", "")
    try:
        pieces, last = section.pieces() if _RULES.fullmatch(text) else ([], -1.0)
    except ValueError:
        pieces, last = [], -1.0
    ends = [until for until, _ in pieces]
    if ends != sorted(set(ends)) or min([last, *(factor for _, factor in pieces)]) < 0:
        said = f'got {shown(section.step_rules)}; write factors and rising steps such as "1:10,0.1:20,0.01"'
        yield Problem(("step_rules",), f"{said}: 1 for 10 steps, 0.1 until step 20, then 0.01.")
