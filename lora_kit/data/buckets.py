"""Which sizes there are to train at, and which of them a picture gets. Pure functions of its width and height."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from lora_kit.recipe import BucketSection

Size = tuple[int, int]
"""Width and height, pixels."""


class Fit(NamedTuple):
    """A size that a picture is trained at."""

    size: Size
    resolution: int
    """The one that was asked for, side of a square of its area."""
    lowered: bool
    """The picture is smaller than its bucket at that resolution, and goes to a smaller one."""
    enlarged: bool
    """The picture is smaller than `size`."""


def bucket_sizes(resolution: int, rules: BucketSection) -> tuple[Size, ...]:
    """The buckets of one resolution, from the widest to the highest; none if its square is out of bounds.

    The square, and for each shorter side, a multiple of `step`, the longest other side that keeps the area at most
    resolution².
    """
    low = rules.min_side or max(rules.step, resolution // 2 // rules.step * rules.step)
    return _sizes(resolution, rules.step, low, rules.max_side or 2 * resolution)


def nearest_size(picture: Size, sizes: Sequence[Size]) -> Size:
    """The size whose shape is nearest, by the distance of the logarithms of width / height; of equal ones the largest,
    then the longest.

    That distance d is the crop's loss too: 1 - exp(-d) of the picture. It is compared as a quotient of whole numbers,
    whose ties are exact: a picture and the same one on its side get the same bucket on its side.
    """
    return max(sizes, key=lambda size: (-crop_loss(picture, size), size[0] * size[1], max(size)))


def crop_loss(picture: Size, size: Size) -> float:
    """Part of the picture's area that is cut off where it is scaled to just cover `size`, 0..1."""
    first, second = picture[0] * size[1], picture[1] * size[0]
    return 1 - min(first, second) / max(first, second)


def fills(picture: Size, size: Size) -> bool:
    """Whether the picture covers `size` without being enlarged."""
    return picture[0] >= size[0] and picture[1] >= size[1]


def fit_picture(picture: Size | None, resolution: int, rules: BucketSection | None) -> Fit:
    """The bucket of a picture at one resolution; the square without `rules`, or for a picture of unknown size (None).

    Of the resolution's buckets the nearest in shape. Unless `upscale`, a picture that does not fill it goes to the
    nearest of the next smaller resolution, in steps of `step`; one that fills none of them is enlarged to the smallest.
    """
    if rules is None:
        square = (resolution, resolution)
        return Fit(square, resolution, False, picture is not None and not fills(picture, square))
    first = size = nearest_size(picture or (1, 1), bucket_sizes(resolution, rules))
    if picture is None or rules.upscale or fills(picture, size):
        return Fit(size, resolution, False, picture is not None and not fills(picture, size))
    for lower in range((resolution - 1) // rules.step * rules.step, 0, -rules.step):
        sizes = bucket_sizes(lower, rules)
        if not sizes:  # below `min_side`
            break
        size = nearest_size(picture, sizes)
        if fills(picture, size):
            break
    return Fit(size, resolution, size != first, not fills(picture, size))


def fit_to_all(picture: Size | None, resolutions: Sequence[int], rules: BucketSection | None) -> list[Fit]:
    """The buckets of a picture, as `per_picture` says: at least one, each once, from the smallest resolution on."""
    found = [fit_picture(picture, resolution, rules) for resolution in sorted(resolutions)]
    if rules is None or len(found) == 1:
        return found
    filled = [fit for fit in found if not fit.lowered and not fit.enlarged]
    if rules.per_picture == "largest":
        return filled[-1:] or found[:1]
    unique: dict[Size, Fit] = {}
    for fit in found if rules.upscale else filled or found[:1]:
        unique.setdefault(fit.size, fit)
    return list(unique.values())


@lru_cache(maxsize=1024)
def _sizes(resolution: int, step: int, low: int, high: int) -> tuple[Size, ...]:
    side = resolution // step * step
    if not low <= side <= high or not side:
        return ()
    sizes: set[Size] = {(side, side)}
    for short in range(low, side + 1, step):
        long = min(high, resolution**2 // short) // step * step
        sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes, key=lambda size: (-size[0] / size[1], -size[0])))
