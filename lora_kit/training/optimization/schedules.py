"""Learning rate over time as pure functions of the step: a resumed run has no schedule to restore."""

from __future__ import annotations

import math
from typing import NamedTuple

from lora_kit.recipe import ScheduleSection


class Rewarm(NamedTuple):
    """A second warm-up that a resumed run was asked for."""

    start: int = 0
    """The step it resumed at."""
    steps: int = 0
    """0: none."""

    def factor(self, step: int) -> float:
        """Share of the schedule's rate at optimizer step `step` (0-based)."""
        done = step - self.start
        return (done + 1) / (self.steps + 1) if 0 <= done < self.steps else 1.0


def learning_rate_factor(section: ScheduleSection, step: int, max_steps: int) -> float:
    """Share of the peak rate at optimizer step `step` (0-based) of `max_steps`.

    The warm-up's first step is not lost at rate 0: step s of W has (s + 1) / (W + 1), which is diffusers' value one
    step later in a warm-up of W + 1. From step W on every curve is diffusers' (transformers' for `inverse_sqrt`).
    """
    rising = (step + 1) / (section.warmup_steps + 1) if step < section.warmup_steps else 1.0
    return rising * _after_warmup(section, step, max_steps)


def _after_warmup(section: ScheduleSection, step: int, max_steps: int) -> float:
    """The curve without its warm-up; 1 before the warm-up's end where it falls by the run's length."""
    if section.name == "constant":
        return min(1.0, (max_steps - step) / (section.decay_steps + 1))
    if section.name == "piecewise_constant":
        return _piecewise(section, step)
    after = max(0, step - section.warmup_steps)
    if section.name == "inverse_sqrt":
        # Zhai et al. 2022: the reciprocal square root of steps, shifted so that it begins at 1.
        timescale = section.timescale or section.warmup_steps or 10_000
        return 1 / math.sqrt(1 + after / timescale)
    done = min(1.0, after / max(1, max_steps - section.warmup_steps))
    if section.name == "cosine_with_restarts":
        return _half_cosine(section.cycles * done % 1.0) if done < 1 else 0.0
    left = {"linear": 1 - done, "cosine": _half_cosine(done), "polynomial": (1 - done) ** section.power}[section.name]
    return section.floor + (1 - section.floor) * left


def _half_cosine(done: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov & Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * done))


def _piecewise(section: ScheduleSection, step: int) -> float:
    pieces, last = section.pieces()
    return next((factor for until, factor in pieces if step < until), last)
