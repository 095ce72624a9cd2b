"""Distributions of timesteps: quantiles of the densities that the papers name, ranges, and strata."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_kit.diffusion import strata_of_step, uniforms_for_samples
from lora_kit.diffusion.timesteps import band, cubic, logit_normal, mode, places_in_strata, timesteps_at

U = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def share_below(places: Tensor, x: float) -> float:
    """Of an even grid of u: the distribution function, to 1 / 200 000."""
    return (places < x).double().mean().item()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 1.5)])
def test_logit_normal_has_the_logits_normal_distribution_function(mean: float, std: float):
    places = logit_normal(U, mean, std)
    for x in (0.05, 0.3, 0.5, 0.8, 0.99):
        wanted = 0.5 * (1 + math.erf((math.log(x / (1 - x)) - mean) / std / math.sqrt(2)))
        assert share_below(places, x) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 1.29, 2 / (math.pi - 2)])
def test_mode_sampling_is_the_papers_function_and_monotone(scale: float):
    places = mode(U, scale)
    u = 1 - U.numpy()  # theirs falls from 1 to 0
    wanted = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    np.testing.assert_allclose(places.numpy(), wanted, rtol=0, atol=1e-15 * 16)
    assert (places.diff() >= -1e-15).all()
    middle = share_below(places, 0.6) - share_below(places, 0.4)
    assert (middle > 0.2 + 1e-4) == (scale > 0) and (middle < 0.2 - 1e-4) == (scale < 0)


def test_cubic_is_one_minus_the_cube_of_a_uniform():
    for x in (0.1, 0.5, 0.9):
        # P(1 - r³ < x) = P(r > (1 - x)^(1/3)).
        assert share_below(cubic(U), x) == pytest.approx(1 - (1 - x) ** (1 / 3), abs=1e-5)


@pytest.mark.parametrize(("start", "stop"), [(0.75, 1.0), (0.0, 0.25), (0.2, 0.5)])
@pytest.mark.parametrize("factor", [2.0, 0.25])
def test_a_band_is_drawn_factor_times_as_often_per_timestep(start: float, stop: float, factor: float):
    times = timesteps_at(band(U, start, stop, factor), 0, 999)
    counts = torch.bincount(times, minlength=1000).double()
    weights = np.where((np.arange(1000) >= 1000 * start) & (np.arange(1000) < 1000 * stop), factor, 1.0)
    # SimpleTuner's table of weights, normalised; the even grid of u gives each timestep its share to one count.
    np.testing.assert_allclose(counts.numpy(), weights / weights.sum() * len(U), rtol=0, atol=1 + 1e-6)


def test_ranges_are_inclusive_and_even():
    times = timesteps_at(U, 200, 299)
    assert torch.bincount(times, minlength=1000)[200:300].tolist() == [2000] * 100
    assert (times.min(), times.max()) == (200, 299)


def test_the_ends_of_the_unit_interval_are_timesteps_too():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for places in (ends, logit_normal(ends, 0.0, 1.0), mode(ends, 1.29), cubic(ends), band(ends, 0.2, 0.5, 2.0)):
        assert timesteps_at(places, 10, 20).tolist() == [10, 20]


def test_strata_give_each_part_of_the_distribution_one_sample():
    order = strata_of_step(0, 3, 8)
    placed = places_in_strata(uniforms_for_samples(0, 3, range(8)), order, range(8))
    assert sorted((placed * 8).long().tolist()) == list(range(8))
    assert sorted(order.tolist()) == list(range(8))


def test_strata_do_not_depend_on_how_the_step_is_cut():
    whole = places_in_strata(uniforms_for_samples(1, 4, range(6)), strata_of_step(1, 4, 6), range(6))
    for part in ([0, 1], [2, 3, 4], [5]):
        cut = places_in_strata(uniforms_for_samples(1, 4, part), strata_of_step(1, 4, 6), part)
        assert torch.equal(cut, whole[part])


def test_a_place_in_the_step_has_no_stratum_of_its_own():
    """Over steps each position sees every stratum alike: 400 steps of 4, binomial(400, 1/4), five deviations."""
    counts = torch.stack([strata_of_step(0, step, 4) for step in range(400)])
    for position in range(4):
        seen = torch.bincount(counts[:, position], minlength=4)
        assert (seen - 100).abs().max() < 5 * math.sqrt(400 * 0.25 * 0.75)


def test_uniforms_are_uniform_and_the_samples_own():
    u = uniforms_for_samples(0, 0, range(4000))
    counts = torch.bincount((u * 10).long(), minlength=10)
    assert (counts - 400).abs().max() < 5 * math.sqrt(4000 * 0.1 * 0.9)
    assert torch.equal(uniforms_for_samples(0, 0, [17, 3]), u[[17, 3]])


def test_strata_lessen_the_variance_of_a_steps_mean():
    """Of a mean over 8 draws of u by 8²: Var(u) / 8 against Var(u) / 8³."""
    plain, shared = [], []
    for step in range(200):
        u = uniforms_for_samples(0, step, range(8))
        plain.append(u.mean())
        shared.append(places_in_strata(u, strata_of_step(0, step, 8), range(8)).mean())
    ratio = torch.stack(plain).var() / torch.stack(shared).var()
    # The logarithm of such a ratio of two variances of 200 has deviation √(4 / 199) = 0.14: log 2 is five of them.
    assert 32 < ratio < 128
