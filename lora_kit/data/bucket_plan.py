"""What training in buckets would do to a data set, for a reader: sizes, crops, steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_kit.data.bucket_order import BucketOrder, order_of, samples_of
from lora_kit.data.bucket_places import fits_of, place_pictures
from lora_kit.data.buckets import Size, crop_loss
from lora_kit.data.records import MAX_NAMED, Record, Records
from lora_kit.data.sizes import read_sizes
from lora_kit.progress import ProgressBar, progress
from lora_kit.recipe import DataSection


class BucketFacts(NamedTuple):
    """One bucket."""

    width: int
    """Pixels."""
    height: int
    pictures: int
    samples: int
    """In an epoch: pictures times their repeats."""
    steps: int
    """In an epoch."""
    wrapped: int
    """Samples that an epoch shows once more to fill the last step."""
    missing: int
    """Samples that the last step of an epoch is short of."""
    mean_crop: float
    """Part of a picture's area that is cut off, mean over pictures, %."""
    largest_crop: float
    """Its largest, %."""
    lowered: int
    """Pictures that are smaller than their bucket at the resolution asked for, and are here instead."""
    enlarged: int
    """Pictures that are smaller than this size."""


class BucketPlan(NamedTuple):
    """All buckets of a data set."""

    buckets: list[BucketFacts]
    """From the smallest area on."""
    pictures: int
    """Of the data set; one that is trained at several sizes counts once."""
    unreadable: int
    """Pictures without a readable header, counted above as squares. A run names them all."""
    unreadable_ids: list[str]
    """The first ten of them."""
    samples: int
    """In an epoch, without the wrapped ones."""
    source_samples: list[int]
    """Those of each source of the data section."""
    steps: int
    """In an epoch."""


def read_bucket_plan(records: Records, section: DataSection, bar: ProgressBar = progress) -> BucketPlan:
    """Read all pictures' headers and say what becomes of them; for a section that `has_buckets`, and whose sources the
    records are of."""
    return bucket_plan(records, read_sizes(records, section.workers, bar), section)


def bucket_plan(records: Sequence[Record], sizes: Sequence[Size | None], section: DataSection) -> BucketPlan:
    """The plan of records whose pictures have these sizes, for a section that `has_buckets`."""
    places = place_pictures(records, sizes, section)
    samples = samples_of(records, places)
    order = order_of(samples, places, section, seed=0)
    assert isinstance(order, BucketOrder)
    pairs = zip(records, sizes, strict=True)
    cuts = [_Cut(*fit, size) for record, size in pairs for fit in fits_of(record, size, section)]
    source_of_record = np.array([record.source for record in records])
    by_source = np.bincount(source_of_record[places.record[samples]], minlength=len(section.sources))
    unreadable = [record.id for record, size in zip(records, sizes, strict=True) if size is None]
    held: list[list[_Cut]] = [[] for _ in places.sizes]
    for bucket, cut in zip(places.bucket, cuts, strict=True):
        held[bucket].append(cut)
    return BucketPlan(
        buckets=[_facts(bucket, cuts, order) for bucket, cuts in enumerate(held)],
        pictures=len(records),
        unreadable=len(unreadable),
        unreadable_ids=unreadable[:MAX_NAMED],
        samples=len(samples),
        source_samples=by_source.tolist(),
        steps=order.steps_per_epoch,
    )


class _Cut(NamedTuple):
    """A picture at one of its sizes: `Fit`, and its own size."""

    size: Size
    resolution: int
    lowered: bool
    enlarged: bool
    picture: Size | None


def _facts(bucket: int, cuts: list[_Cut], order: BucketOrder) -> BucketFacts:
    losses = [100 * crop_loss(cut.picture, cut.size) for cut in cuts if cut.picture] or [0.0]
    samples, steps = int(order.counts[bucket]), int(order.steps[bucket])
    rest = steps * order.batch_size - samples
    return BucketFacts(
        *cuts[0].size,
        pictures=len(cuts),
        samples=samples,
        steps=steps,
        wrapped=rest if order.wraps else 0,
        missing=0 if order.wraps else rest,
        mean_crop=sum(losses) / len(losses),
        largest_crop=max(losses),
        lowered=sum(cut.lowered for cut in cuts),
        enlarged=sum(cut.enlarged for cut in cuts),
    )
