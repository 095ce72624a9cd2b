"""How often pictures appear: sources' weights → whole repeats, and regularisation pictures beside the others."""

from __future__ import annotations

from collections.abc import Sequence

_TOLERANCE = 0.01
# Repeats of at least r are rounded by at most 1/(2 r) of themselves, and shares move by twice that: under 1/100 here.
_ENOUGH = 102


def weighted_repeats(samples: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How often to repeat each source so that its share of all samples is its weight's share of all weights.

    samples: of each source in an epoch, before. The smallest repeats are returned for which every share is within
    1 % of itself: all pictures of a source appear equally often, and an epoch is no longer than that takes.
    A source without samples gets 1.
    """
    rates = [weight / count if count else 0.0 for weight, count in zip(weights, samples, strict=True)]
    least = min((rate for rate in rates if rate), default=1.0)
    total = sum(weight for weight, rate in zip(weights, rates, strict=True) if rate)
    repeats = [1] * len(rates)
    for scale in range(1, _ENOUGH + 1):
        repeats = [max(1, round(rate / least * scale)) for rate in rates]
        got = [count * each for count, each in zip(samples, repeats, strict=True)]
        wanted = [weight / total * sum(got) if rate else 0.0 for weight, rate in zip(weights, rates, strict=True)]
        if all(abs(have - want) <= _TOLERANCE * want for have, want in zip(got, wanted, strict=True)):
            break
    return repeats


def balanced_repeats(repeats: Sequence[int], wanted: int) -> list[int]:
    """Repeats of regularisation pictures, raised by one after the other until they are `wanted` samples, as sd-scripts
    does; as they are where there are more."""
    missing = max(0, wanted - sum(repeats))
    rounds, rest = divmod(missing, len(repeats)) if repeats else (0, 0)
    return [times + rounds + (index < rest) for index, times in enumerate(repeats)]
