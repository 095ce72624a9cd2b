"""Confidence intervals of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

_T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""Student's t at 97.5 % for 1 to 10 degrees of freedom."""
_Z975 = 1.959964


class Interval(NamedTuple):
    """A mean and how well it is known."""

    mean: float
    standard_error: float
    """Sample deviation / √n; NaN of one number."""
    half_width: float
    """The mean ± this holds the true one in 95 of 100 cases, if the numbers are independent and not too skew
    (Student's t)."""


def interval(values: Sequence[float]) -> Interval:
    """Of independent numbers, such as one difference a picture."""
    numbers = torch.tensor(list(values), dtype=torch.float64)
    if len(numbers) < 2:
        return Interval(float(numbers.mean()), math.nan, math.nan)
    error = float(numbers.std() / math.sqrt(len(numbers)))
    return Interval(float(numbers.mean()), error, student_t(len(numbers) - 1) * error)


def difference(first: Interval, second: Interval, counts: tuple[int, int]) -> Interval:
    """first - second of two independent means (Welch 1947), with the smaller sample's degrees of freedom: on the safe
    side."""
    error = math.hypot(first.standard_error, second.standard_error)
    return Interval(first.mean - second.mean, error, student_t(max(1, min(counts) - 1)) * error)


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t; above 10 degrees of freedom by its expansion (Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z, n = _Z975, freedom
    first = (z**3 + z) / (4 * n)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + first + second + third
