"""Sizes in sd-scripts' data-set TOML: `resolution` → that of `data` and of sources, bucket keys → `data.buckets`.

What sd-scripts does with the bucket keys (library/train_util.py, BucketManager; library/model_util.py,
make_bucket_resolutions), and what is kept of it here:

- Without `bucket_no_upscale`, buckets are made from resolution, steps and bounds, and every picture is scaled to its
  bucket, up or down. So it is here with `upscale`. sd-scripts also makes buckets that are smaller than others of the
  same shorter side (704 × 320 beside 768 × 320, at 512), and takes the one whose width / height is nearest as a
  difference; here there are only the largest, and the nearest is the one that cuts off least.
- Bounds that are no multiple of the steps are widened to the next one. So they are here.
- With `bucket_no_upscale`, bounds are ignored: a picture of more than resolution² pixels is scaled down to that area, a
  smaller one stays, and its sides are cut to whole steps, so that any number of buckets arises. Here a picture goes to
  the nearest bucket of the largest resolution that it fills, in whole steps, without bounds: never enlarged either, but
  a small one may be scaled down a little where sd-scripts only cuts.
- Each `[[datasets]]` has buckets of its own there, and batches never mix data sets. Here batches mix what has one size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_kit.recipe.base import Problem, shown
from lora_kit.recipe.kohya_keys import Subset, is_toml
from lora_kit.recipe.sections import DataSection

_BOUNDS = {"min_bucket_reso": "min_side", "max_bucket_reso": "max_side"}
BUCKET_FIELDS = {"bucket_reso_steps": "step", **_BOUNDS, "bucket_no_upscale": "upscale"}
"""Key → field of `data.buckets`. They do nothing without `enable_bucket`."""


class _Rules(NamedTuple):
    """What a subset says of buckets, with sd-scripts' defaults; bounds are None where they are ignored."""

    enable_bucket: bool
    bucket_reso_steps: int
    min_bucket_reso: int | None
    max_bucket_reso: int | None
    bucket_no_upscale: bool


def own_resolution(subset: Subset, shared: int) -> int | None:
    """The subset's resolution, pixels, if it is another than that of `data`."""
    side = _side(subset)
    return None if side == shared else side


def shared_resolution(subsets: Sequence[Subset], data: DataSection) -> int:
    """The resolution of `data`, pixels: the recipe's own, else the first data set's, else the section's default."""
    sides = [side for subset in subsets if (side := _side(subset)) is not None]
    return data.resolution if "resolution" in data.model_fields_set or not sides else sides[0]


def size_problems(subsets: Sequence[Subset], data: DataSection) -> Iterator[Problem]:
    """What cannot be followed of resolutions and buckets; of subsets of one or more files."""
    oblong = list(_oblong(subsets))
    yield from oblong or _resolutions(subsets, data)
    differing = list(_differing(subsets))
    yield from differing or _against_recipe(subsets, data)


def size_fields(subsets: Sequence[Subset], data: DataSection) -> dict[str, Any]:
    """`resolution` and `buckets` of `data`, as far as the TOML says anything of them."""
    fields: dict[str, Any] = {}
    if any("resolution" in subset.keys for subset in subsets):
        fields["resolution"] = shared_resolution(subsets, data)
    rules = _rules(subsets[0].keys)
    if rules.enable_bucket:
        own = data.buckets.model_dump(exclude_unset=True) if data.buckets else {}
        fields["buckets"] = _buckets(rules, subsets, data) | own
    return fields


def _buckets(rules: _Rules, subsets: Sequence[Subset], data: DataSection) -> dict[str, Any]:
    step, low, high = rules.bucket_reso_steps, rules.min_bucket_reso, rules.max_bucket_reso
    if low is None or high is None:
        largest = max(_side(subset) or data.resolution for subset in subsets)
        low, high = step, max(step, largest**2 // step)  # what the area allows
        return {"step": step, "min_side": low, "max_side": high // step * step, "upscale": False}
    low, high = max(step, low // step * step), -(-high // step) * step
    return {"step": step, "min_side": low, "max_side": high, "upscale": True}


def _rules(keys: Mapping[str, Any]) -> _Rules:
    no_upscale = keys.get("bucket_no_upscale", False)
    return _Rules(
        enable_bucket=keys.get("enable_bucket", False),
        bucket_reso_steps=keys.get("bucket_reso_steps", 64),
        min_bucket_reso=None if no_upscale else keys.get("min_bucket_reso", 256),
        max_bucket_reso=None if no_upscale else keys.get("max_bucket_reso", 1024),
        bucket_no_upscale=no_upscale,
    )


def _side(subset: Subset) -> int | None:
    value = subset.keys.get("resolution")
    return value[0] if isinstance(value, list) else value  # pairs that differ have been refused


def _oblong(subsets: Sequence[Subset]) -> Iterator[Problem]:
    for subset in subsets:
        value = subset.keys.get("resolution")
        if isinstance(value, list) and value[0] != value[1]:
            side = math.isqrt(value[0] * value[1]) // 8 * 8
            said = f"resolution = {shown(value)} is not a square. Write {side}, which is about its area, and with"
            yield Problem((*subset.path, "resolution"), f"{said} enable_bucket = true pictures keep their shapes.")


def _resolutions(subsets: Sequence[Subset], data: DataSection) -> Iterator[Problem]:
    sides = [_side(subset) for subset in subsets]
    given = list(dict.fromkeys(side for side in sides if side is not None))
    in_recipe = "resolution" in data.model_fields_set
    # The recipe's may be that of sources beside the TOML.
    is_alone = all(is_toml(source) for source in data.sources)
    if given and in_recipe and is_alone and data.resolution not in sides and None not in sides:
        told = " and ".join(map(str, given))
        said = f"resolution means data.resolution: {told}, but the recipe has {data.resolution}."
        yield Problem((), f"{said} Change one of them, or leave it out of the recipe.")
    if given and not in_recipe:
        for subset, side in zip(subsets, sides, strict=True):
            if side is None:
                said = f"needed, as other data sets have one ({given[0]}); or set data.resolution in the recipe."
                yield Problem((*subset.path[:-2], "resolution"), said)


def _differing(subsets: Sequence[Subset]) -> Iterator[Problem]:
    rules = [_rules(subset.keys) for subset in subsets]
    enabled = [rule.enable_bucket for rule in rules]
    if not any(enabled):
        return
    if not all(enabled):
        said = "enable_bucket differs between data sets; data.buckets is one for all. Make it the same."
        yield Problem((), said)
        return
    for key in BUCKET_FIELDS:
        values = list(dict.fromkeys(getattr(rule, key) for rule in rules))
        if len(values) > 1 and None not in values:
            told = " and ".join(map(shown, values))
            said = f"{key} differs between data sets ({told}); data.buckets is one for all. Make it the same."
            yield Problem((), said)


def _against_recipe(subsets: Sequence[Subset], data: DataSection) -> Iterator[Problem]:
    """Where the recipe has buckets too: what both say must be the same, and what only one says holds."""
    if "buckets" not in data.model_fields_set:
        return
    told = {key for subset in subsets for key in subset.keys}
    rules = _rules(subsets[0].keys)
    if "enable_bucket" in told and rules.enable_bucket != (data.buckets is not None):
        said = f"enable_bucket = {shown(rules.enable_bucket)}, but the recipe"
        yield Problem((), f"{said} {'has' if data.buckets else 'turns off'} data.buckets. Change one of them.")
    if data.buckets is None or not rules.enable_bucket:
        return
    meant = _buckets(rules, subsets, data)
    for key, field in BUCKET_FIELDS.items():
        ignored = rules.bucket_no_upscale and key in _BOUNDS
        own = getattr(data.buckets, field)
        if key in told and not ignored and field in data.buckets.model_fields_set and own != meant[field]:
            said = f"{key} means data.buckets.{field}: {shown(meant[field])}, but the recipe has {shown(own)}."
            yield Problem((), f"{said} Change one of them.")
