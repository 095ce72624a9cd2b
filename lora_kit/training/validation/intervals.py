"""Means with their 95 % confidence intervals, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean, stdev
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and where the true one lies with 95 % confidence; infinite both ways where one value tells no spread."""

    mean: float
    standard_error: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    def named(self, name: str) -> dict[str, float]:
        """The mean under `name`, the interval's ends under `name`_low and _high where they are finite."""
        ends = {f"{name}_low": self.low, f"{name}_high": self.high} if math.isfinite(self.high) else {}
        return {name: self.mean, **ends}


def interval(values: Sequence[float]) -> Interval:
    """mean ± t(0.975, n - 1) s / √n of n independent values, such as pictures' paired differences (Student 1908)."""
    mean, count = fmean(values), len(values)
    if count < 2:
        return Interval(mean, math.inf, -math.inf, math.inf)
    error = stdev(values) / math.sqrt(count)
    return _around(mean, error, count - 1)


def difference_of_means(first: Sequence[float], second: Sequence[float]) -> Interval:
    """mean(first) - mean(second) of two independent samples with their own spreads (Welch 1947).

    The degrees of freedom are rounded down, which widens the interval.
    """
    mean = fmean(first) - fmean(second)
    if min(len(first), len(second)) < 2:
        return Interval(mean, math.inf, -math.inf, math.inf)
    parts = [stdev(sample) ** 2 / len(sample) for sample in (first, second)]
    total = sum(parts)
    if total == 0:
        return Interval(mean, 0.0, mean, mean)
    freedom = total**2 / sum(part**2 / (len(sample) - 1) for part, sample in zip(parts, (first, second), strict=True))
    return _around(mean, math.sqrt(total), max(1, int(freedom)))


@lru_cache(maxsize=256)
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t for which P(|T| ≤ t) = `confidence`, T having Student's distribution with `freedom` ≥ 1 degrees."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        high *= 2
    for _ in range(80):  # more than a float has bits
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def _around(mean: float, error: float, freedom: int) -> Interval:
    reach = t_quantile(freedom) * error
    return Interval(mean, error, mean - reach, mean + reach)


def _within(t: float, freedom: int) -> float:
    """P(|T| ≤ t), by the finite sums for whole degrees of freedom (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine, odd = math.cos(angle), math.sin(angle), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= (power - 1) / power * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
