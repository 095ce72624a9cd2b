"""The `data.buckets:` section: pictures keep their shapes, each in the bucket whose shape is nearest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator

from lora_kit.recipe.base import Problem, Section, refuse
from lora_kit.recipe.sources import Resolution, SourceSection

Side = Annotated[int, Field(ge=8, multiple_of=8)]


class BucketSection(Section):
    """Sizes that pictures are trained at. `buckets: {}` turns buckets on with the values below.

    A bucket's area is at most `resolution`², so no batch takes more memory than one of squares. Each batch is of one
    bucket.
    """

    step: Side = 64
    """Sides are multiples of this, pixels. 64 is what the UNet of SD halves without a rest; 8 cuts less off the
    pictures, makes many more buckets, and needs batches that small buckets can fill."""
    min_side: Side | None = None
    """Shortest side of a bucket, pixels. Default: half the resolution, which with `max_side` bounds shapes to 1:4."""
    max_side: Side | None = None
    """Longest side of a bucket, pixels. Default: twice the resolution."""
    upscale: bool = False
    """Enlarge a picture that is smaller than its bucket. Off: it goes to the buckets of the largest smaller resolution,
    in steps of `step`, that it fills, so that no blur is learned. A notice counts such pictures."""
    resolutions: Annotated[list[Resolution], Field(min_length=1)] | None = None
    """Several resolutions instead of `data.resolution`, pixels, such as `[512, 768]`; a source with a `resolution` of
    its own keeps to that. Held-out and validation pictures stay at `data.resolution`."""
    per_picture: Literal["all", "largest"] = "all"
    """With several resolutions: each picture is trained at `all` that it fills (with `upscale`, at all), once an epoch
    at each; or only at the `largest` that it fills. One that fills none is trained at the smallest, as `upscale`
    says."""
    short: Literal["wrap", "short"] = "wrap"
    """The last batch of a bucket in an epoch, where its pictures do not fill it: `wrap` goes on with the epoch's first
    of the same bucket, so that some appear once more; `short` takes a step of fewer pictures, each of which then counts
    more. No picture is ever left out."""

    @field_validator("resolutions")
    @classmethod
    def _differ(cls, resolutions: list[int] | None) -> list[int] | None:
        twice = sorted({side for side in resolutions or () if (resolutions or []).count(side) > 1})
        said = "is there twice; to show pictures more often use `repeats` of their source."
        refuse("BucketSection", [Problem((), f"{side} {said}") for side in twice])
        return resolutions


def bucket_problems(
    buckets: BucketSection | None, resolution: int, sources: Sequence[SourceSection]
) -> Iterator[Problem]:
    """What is wrong between `data.buckets` and the resolutions that it is to serve."""
    if buckets is None:
        return
    for name in ("min_side", "max_side"):
        side = getattr(buckets, name)
        if side is not None and side % buckets.step:
            lower = side // buckets.step * buckets.step
            said = f"got {side}, not a multiple of `step` = {buckets.step}; write {lower or buckets.step}"
            yield Problem(("buckets", name), f"{said} or {lower + buckets.step}.")
    named = [(("buckets", "resolutions", i), side) for i, side in enumerate(buckets.resolutions or ())]
    named = named or [(("resolution",), resolution)]
    named += [(("sources", i, "resolution"), s.resolution) for i, s in enumerate(sources) if s.resolution is not None]
    for path, side in named:
        said = side_problem(buckets, side)
        if said:
            yield Problem(path, said)


def side_problem(buckets: BucketSection | None, resolution: int) -> str:
    """Why a resolution has no bucket; empty if it has."""
    if buckets is None:
        return ""
    side = resolution // buckets.step * buckets.step
    if not side:
        return (
            f"got {resolution}, below `data.buckets.step` = {buckets.step}; make that at most {resolution}, such as 8."
        )
    low, high = buckets.min_side, buckets.max_side
    if low is not None and low > side:
        return f"got {resolution}, whose square of {side} is below `data.buckets.min_side` = {low}; lower that."
    if high is not None and high < side:
        return f"got {resolution}, whose square of {side} is above `data.buckets.max_side` = {high}; raise that."
    return ""
