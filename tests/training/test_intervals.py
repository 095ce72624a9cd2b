"""Confidence intervals, against printed tables and a simulation."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import pytest

from lora_kit.training.validation.intervals import difference_of_means, interval, t_quantile


@pytest.mark.parametrize(
    ("freedom", "printed"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (29, 2.045), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_printed_table(freedom: int, printed: float) -> None:
    assert t_quantile(freedom) == pytest.approx(printed, abs=0.0005 + 1e-9)  # the table has three decimals


def test_many_degrees_of_freedom_come_to_the_normal_quantile() -> None:
    # Cornish-Fisher: t = z + (z³ + z) / 4ν + O(ν^-2).
    z = NormalDist().inv_cdf(0.975)
    assert t_quantile(10_000) == pytest.approx(z + (z**3 + z) / 40_000, abs=1e-7)


def test_an_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    draw = random.Random(0)
    held = [
        low <= 0.3 <= high
        for _, _, low, high in (interval([draw.gauss(0.3, 2) for _ in range(4)]) for _ in range(4000))
    ]
    # Four deviations of a binomial share: 4 √(0.95 × 0.05 / 4000).
    assert sum(held) / 4000 == pytest.approx(0.95, abs=0.014)


def test_a_difference_of_means_holds_the_true_one_with_unequal_spreads() -> None:
    draw = random.Random(1)

    def one() -> bool:
        found = difference_of_means([draw.gauss(1, 1) for _ in range(5)], [draw.gauss(0, 6) for _ in range(12)])
        return found.low <= 1 <= found.high

    # Welch's approximation is off by less than a hundredth here; rounding down only widens.
    assert 0.93 < sum(one() for _ in range(4000)) / 4000 < 0.98


def test_one_picture_tells_no_interval() -> None:
    found = interval([0.5])
    assert not found.tells
    assert math.isinf(found.high)
    assert found.named("x") == {"x": 0.5}
    assert interval([0.1, 0.1, 0.1]).tells
