"""Schedules against diffusers' and transformers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup, get_inverse_sqrt_schedule

from lora_kit.recipe import ScheduleSection
from lora_kit.training.optimization.schedules import Rewarm, learning_rate_factor

STEPS = 40
CASES = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"cycles": 3},
    "polynomial": {"power": 2.0},
    "inverse_sqrt": {"timescale": 7},
    "piecewise_constant": {"step_rules": "1:10,0.1:20,0.005"},
}


def theirs(name: str, warmup: int, settings: dict) -> list[float]:
    """Factors of steps 0 … STEPS - 1 by their LambdaLR; lr 1, so that the rate is the factor."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if name == "inverse_sqrt":
        schedule = get_inverse_sqrt_schedule(optimizer, warmup, timescale=settings["timescale"])
    elif name == "polynomial":  # get_scheduler has no lr_end
        schedule = get_polynomial_decay_schedule_with_warmup(optimizer, warmup, STEPS, 0.0, settings["power"])
    else:
        name = "constant_with_warmup" if name == "constant" else name
        named = {"num_cycles": settings.get("cycles", 1), "step_rules": settings.get("step_rules")}
        schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS, **named)
    return [schedule.lr_lambdas[0](step) for step in range(STEPS)]


def ours(section: ScheduleSection) -> list[float]:
    return [learning_rate_factor(section, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("warmup", [0, 6])
@pytest.mark.parametrize("name", CASES)
def test_every_curve_is_diffusers_from_the_warmup_on(name, warmup):
    section = ScheduleSection(name=name, warmup_steps=warmup, **CASES[name])
    # Both are a handful of float64 operations on numbers of order 1.
    assert ours(section)[warmup:] == pytest.approx(theirs(name, warmup, CASES[name])[warmup:], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", [name for name in CASES if name != "piecewise_constant"])  # it has no warm-up there
def test_a_warmup_is_diffusers_longer_by_one_step_without_its_first_at_rate_zero(name):
    longer = theirs(name, 7, CASES[name])
    assert ours(ScheduleSection(name=name, warmup_steps=6, **CASES[name]))[:6] == pytest.approx(longer[1:7], rel=1e-12)


def test_a_warmup_of_piecewise_constant_rises_to_its_pieces():
    section = ScheduleSection(name="piecewise_constant", warmup_steps=3, step_rules="0.5:10,0.1")
    assert ours(section)[:5] == [0.125, 0.25, 0.375, 0.5, 0.5]


def test_a_floor_is_transformers_cosine_with_min_lr():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 5, STEPS, min_lr_rate=0.1)
    wanted = [schedule.lr_lambdas[0](step) for step in range(5, STEPS)]
    got = ours(ScheduleSection(name="cosine", warmup_steps=5, floor=0.1))[5:]
    assert got == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "polynomial"])
def test_a_floor_is_where_the_curve_ends(name):
    section = ScheduleSection(name=name, floor=0.25)
    assert learning_rate_factor(section, STEPS, STEPS) == 0.25
    assert learning_rate_factor(section, STEPS // 2, STEPS) == pytest.approx(0.625)


def test_the_end_of_a_constant_schedule_moves_without_changing_what_came_before():
    section = ScheduleSection(decay_steps=9)
    short = [learning_rate_factor(section, step, 20) for step in range(20)]
    long = [learning_rate_factor(section, step, 40) for step in range(40)]
    assert short[:10] == long[:10] == [1.0] * 10
    assert short[-10:] == pytest.approx([k / 10 for k in range(10, 0, -1)])
    assert long[-10:] == short[-10:]


def test_a_rewarm_rises_from_the_step_of_the_resume_and_is_over_after_it():
    ramp = Rewarm(start=10, steps=4)
    assert [ramp.factor(step) for step in range(9, 16)] == [1.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert {Rewarm().factor(step) for step in range(5)} == {1.0}
