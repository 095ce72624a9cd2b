"""The plan of buckets, for human eyes and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from lora_kit.data.bucket_plan import BucketFacts, BucketPlan


def bucket_json(plan: BucketPlan) -> dict[str, Any]:
    """As the document of `lora-kit plan --json` holds it."""
    return plan._asdict() | {"buckets": [bucket._asdict() for bucket in plan.buckets]}


def bucket_table(plan: BucketPlan) -> Table:
    """A rich table: a row for each bucket, then their sum."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    buckets = plan.buckets
    filled = "short of" if any(bucket.missing for bucket in buckets) else "once more"
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("bucket", no_wrap=True)
    columns = ("pictures", "samples", filled, "steps", "cut off", "at most")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for bucket in buckets:
        table.add_row(f"{bucket.width} × {bucket.height}", *_cells(bucket))
    table.add_section()
    rests = sum(bucket.wrapped + bucket.missing for bucket in buckets)
    cells = (f"{plan.pictures:,}", f"{plan.samples:,}", _count(rests), f"{plan.steps:,}")
    table.add_row("in an epoch", *cells, *_crops(plan), style="bold")
    return table


def bucket_lines(plan: BucketPlan) -> Iterator[str]:
    """What the table cannot say."""
    lowered = sum(bucket.lowered for bucket in plan.buckets)
    enlarged = sum(bucket.enlarged for bucket in plan.buckets)
    if lowered:
        yield f"buckets: pictures smaller than their bucket, which go to a smaller one: {lowered:,}"
    if enlarged:
        yield f"buckets: pictures that are enlarged: {enlarged:,}"
    if plan.unreadable:
        named = ", ".join(plan.unreadable_ids) + (", …" if plan.unreadable > len(plan.unreadable_ids) else "")
        yield f"buckets: pictures that cannot be read, counted as squares: {plan.unreadable:,} ({named})"


def _cells(bucket: BucketFacts) -> tuple[str, ...]:
    return (
        f"{bucket.pictures:,}",
        f"{bucket.samples:,}",
        _count(bucket.wrapped + bucket.missing),
        f"{bucket.steps:,}",
        f"{bucket.mean_crop:.1f} %",
        f"{bucket.largest_crop:.1f} %",
    )


def _crops(plan: BucketPlan) -> tuple[str, str]:
    held = sum(bucket.pictures for bucket in plan.buckets)
    mean = sum(bucket.mean_crop * bucket.pictures for bucket in plan.buckets) / held
    return f"{mean:.1f} %", f"{max(bucket.largest_crop for bucket in plan.buckets):.1f} %"


def _count(number: int) -> str:
    return f"{number:,}" if number else ""
