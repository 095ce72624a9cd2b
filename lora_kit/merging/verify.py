"""Are the written weights right? A sample of them against float64, and all of them against an original."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters.state import is_plain_lora
from lora_kit.errors import ModelError
from lora_kit.merging.base import Base
from lora_kit.merging.fuse import BLOCK, Delta, Part, delta, matrix, working_dtype
from lora_kit.merging.report import Distance, WeightCheck
from lora_kit.merging.stored import WeightFile
from lora_kit.merging.wanted import Parts, all_parts

SAMPLE = 8
LARGE = 1 << 22
"""Values of a weight; 32 MiB in float64."""


class _Measured(NamedTuple):
    error: float
    """max |written - exact| / max |exact|."""
    cast: float
    """max |exact rounded to the written precision - exact| / max |exact|."""
    share: float
    """Largest error as a share of the bound for its place."""


def check_weights(base: Base, written: Sequence[WeightFile | None], parts: Parts) -> WeightCheck:
    """Recompute a sample of what was written in float64, and hold it against what rounding allows.

    written: for each of the base's files the one that replaces it, read back from disk.
    Raises ModelError naming the worst weight if one is beyond rounding.
    """
    found: dict[str, _Measured] = {}
    for (number, key), part in sample_of([*all_parts(parts)]):
        file = written[number]
        assert file is not None, f"file {number} was not written, but changes"
        rows = slice(part.start, part.stop)
        stored, merged = matrix(base.files[number].read(key))[rows], matrix(file.read(key))[rows]
        found[f"{part.module}.{part.kind}"] = _measure(part, stored, merged)
    worst = max(found, key=lambda name: found[name].share)
    if not found[worst].share <= 1:
        raise ModelError(
            f"{worst}: the merged weight is {found[worst].share:.1f} times further from its float64 value than "
            "rounding allows. Nothing was written."
        )
    shown = max(found.values(), key=lambda one: one.error)
    return WeightCheck(len(found), shown.error, shown.cast, found[worst].share)


def _measure(part: Part, stored: Tensor, merged: Tensor) -> _Measured:
    """One weight against float64, some rows at a time.

    With u = 2^-24 and R the summed ranks, the fp32 result is within (R + 4) · u · (|W| + |up| · |down|) (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1), and what the updates' own arithmetic costs where
    they are more than two factors; the cast adds half a unit in the last place.
    """
    change = delta(part, stored, torch.float64)
    own = _own_rounding(part, stored)
    terms = len(part.updates) + 4 + (0 if change.down is None else change.down.shape[0])
    unit = torch.finfo(working_dtype(stored.dtype)).eps / 2
    limits = torch.finfo(merged.dtype)
    largest = error = cast = share = 0.0
    for rows, added, magnitude in _rows(change, stored):
        exact = stored[rows].double() + added
        off = (merged[rows].double() - exact).abs()
        arithmetic = terms * unit * (stored[rows].double().abs() + magnitude)
        arithmetic = arithmetic if own is None else arithmetic + own[rows]
        allowed = arithmetic + limits.eps / 2 * (exact.abs() + arithmetic) + limits.smallest_normal * limits.eps / 2
        largest = max(largest, float(exact.abs().max()))
        error = max(error, float(off.max()))
        cast = max(cast, float((exact.to(merged.dtype).double() - exact).abs().max()))
        share = max(share, float((off / allowed).nan_to_num(float("inf")).max()))
    return _Measured(error / (largest or 1.0), cast / (largest or 1.0), share)


def _is_plain(part: Part) -> bool:
    return all(is_plain_lora(one.update) for one in part.updates)


def _own_rounding(part: Part, stored: Tensor) -> Tensor | None:
    """[rows, columns]: what fp32 costs within updates that are more than two factors."""
    total: Tensor | None = None
    for update, scale in part.updates if part.kind == "weight" else ():
        if not is_plain_lora(update):
            own = matrix(update.rounding(scale, stored.double().reshape(part.shape)).reshape(part.shape))
            total = own if total is None else total + own
    return total


def _rows(change: Delta, stored: Tensor) -> Iterator[tuple[slice, Tensor | float, Tensor | float]]:
    """(rows, ΔW there, Σ |up| · |down| + |dense| there) in float64."""
    step = max(1, BLOCK // max(stored.shape[1], 1))
    sizes = None if change.down is None else change.down.abs()
    for start in range(0, stored.shape[0], step):
        rows = slice(start, start + step)
        added: Tensor | float = 0.0
        magnitude: Tensor | float = 0.0
        if change.up is not None and change.down is not None and sizes is not None:
            added, magnitude = change.up[rows] @ change.down, change.up[rows].abs() @ sizes
        if change.dense is not None:
            added, magnitude = added + change.dense[rows], magnitude + change.dense[rows].abs()
        yield rows, added, magnitude


def sample_of(parts: Sequence[tuple[tuple[int, str], Part]]) -> list[tuple[tuple[int, str], Part]]:
    """Up to SAMPLE of `parts`, evenly spread, the first and last among them.

    Large weights are passed over where an update is more than two factors: its float64 arithmetic needs the whole
    weight several times, where factors are multiplied some rows at a time.
    """
    small = [(place, part) for place, part in parts if math.prod(part.shape) <= LARGE or _is_plain(part)]
    items = small or list(parts)
    count = min(SAMPLE, len(items))
    if count < 2:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def unmerge_bound(base: Base, written: Sequence[WeightFile | None], parts: Parts) -> float:
    """How far an un-merged weight may be from the original, relative to the weight's largest value.

    The merge rounded W + ΔW once and the un-merge rounds W once more, each to half a unit in the last place of its
    precision, beside the two sums in fp32: u₁ · |W + ΔW| + u₂ · |W| + 2 · (R + 4) · 2^-24 · (|W + ΔW| + |W|), with
    each tensor's largest values; the worst of all tensors is returned.
    """
    worst = 0.0
    for (number, key), part in all_parts(parts):
        file = written[number]
        assert file is not None, f"file {number} was not written, but changes"
        rows = slice(part.start, part.stop)
        merged, left = base.files[number].read(key)[rows], file.read(key)[rows]
        sizes = [float(torch.stack(torch.aminmax(tensor)).abs().max()) for tensor in (merged, left)]
        units = [torch.finfo(tensor.dtype).eps / 2 for tensor in (merged, left)]
        ranks = sum(one.update.rank or 1 for one in part.updates)
        casts = units[0] * sizes[0] + units[1] * sizes[1]
        worst = max(worst, (casts + 2 * (ranks + 4) * 2.0**-24 * sum(sizes)) / (sizes[1] or 1.0))
    return worst


def distance(base: Base, written: Sequence[WeightFile | None], original: Base) -> Distance:
    """Every written tensor against the original's, exactly. Raises ModelError if the original is another network."""
    places = {(original.component_of(number, key), key): number for number, key in _keys(original)}
    equal = count = 0
    largest, relative, where = 0.0, 0.0, ""
    for number, file in enumerate(written):
        for key in file.tensors if file else ():
            assert file is not None
            place = places.get((base.component_of(number, key), key))
            if place is None or original.files[place].tensors[key].shape != file.tensors[key].shape:
                raise ModelError(f"{original.path} is another network: it has no {key} of the same shape.")
            got, expected = file.read(key), original.files[place].read(key)
            count += 1
            if got.dtype == expected.dtype and torch.equal(got, expected):
                equal += 1
                continue
            off, size = _difference(got, expected)
            if off / (size or 1.0) > relative:
                largest, relative, where = off, off / (size or 1.0), key
    return Distance(count, equal, largest, relative, where)


def _difference(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """(max |got - expected|, max |expected|) in float64, in pieces."""
    pairs = zip(got.reshape(-1).split(BLOCK), expected.reshape(-1).split(BLOCK), strict=True)
    pieces = [(float((a.double() - b.double()).abs().max()), float(b.double().abs().max())) for a, b in pairs]
    return max(off for off, _ in pieces), max(size for _, size in pieces)


def _keys(base: Base) -> Iterator[tuple[int, str]]:
    return ((number, key) for number, file in enumerate(base.files) for key in file.tensors)
