"""The order of batches with buckets: one bucket a step, every sample once an epoch, the same after a resume and in any
number of processes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kit.data import Share, StepSampler, micro_batches
from lora_kit.data.bucket_order import BucketOrder, StreamOrder, Turn
from lora_kit.data.order import permutation

quick = settings(max_examples=40, deadline=None)
bucket_counts = st.lists(st.integers(1, 12), min_size=1, max_size=5)
orders = st.tuples(bucket_counts, st.integers(1, 6), st.booleans(), st.integers(0, 3))


def make(drawn: tuple[list[int], int, bool, int]) -> BucketOrder:
    """Samples of the buckets alternate, as they do where repeats and shapes are mixed."""
    counts, batch_size, wraps, seed = drawn
    buckets = np.repeat(np.arange(len(counts)), counts)
    return BucketOrder(buckets[np.random.default_rng(0).permutation(len(buckets))], batch_size, wraps, seed)


def turns(order: BucketOrder | StreamOrder, step: int) -> list[Turn]:
    start = step * order.batch_size
    return [order.locate(start + place) for place in range(order.size_of(step))]


@quick
@given(orders, st.integers(0, 2))
def test_every_step_is_of_one_bucket_and_one_epoch(drawn: tuple[list[int], int, bool, int], epoch: int) -> None:
    order = make(drawn)
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        found = turns(order, step)
        assert {turn.epoch for turn in found} == {epoch} == {order.epochs_before(step)}
        assert len({int(order.buckets[turn.sample]) for turn in found}) == 1


@quick
@given(orders, st.integers(0, 2))
def test_an_epoch_holds_every_sample_once_and_wrapped_ones_besides(
    drawn: tuple[list[int], int, bool, int], epoch: int
) -> None:
    order = make(drawn)
    counts, batch_size, wraps, _ = drawn
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    found = [turn for step in steps for turn in turns(order, step)]
    first = [turn.sample for turn in found if turn.chance == turn.sample]
    assert sorted(first) == list(range(sum(counts)))
    again = Counter(int(order.buckets[turn.sample]) for turn in found if turn.chance != turn.sample)
    rests = {bucket: -count % batch_size if wraps else 0 for bucket, count in enumerate(counts)}
    assert again == Counter(rests)
    assert len({turn.chance for turn in found}) == len(found)  # each has draws of its own


@quick
@given(orders)
def test_wrapping_goes_evenly_around(drawn: tuple[list[int], int, bool, int]) -> None:
    order = make(drawn)
    found = [turn.sample for step in range(order.steps_per_epoch) for turn in turns(order, step)]
    times = Counter(found)
    for bucket in range(len(drawn[0])):
        own = [times[sample] for sample in np.flatnonzero(order.buckets == bucket).tolist()]
        assert max(own) - min(own) <= 1


@quick
@given(orders, st.integers(1, 3), st.integers(1, 4))
def test_resumed_at_every_step_by_any_number_of_processes_the_rest_is_the_same(
    drawn: tuple[list[int], int, bool, int], world: int, micro: int
) -> None:
    order = make(drawn)
    batch_size = max(drawn[1], world)
    order = BucketOrder(order.buckets, batch_size, order.wraps, order.seed)
    last = 2 * order.steps_per_epoch
    whole = [turns(order, step) for step in range(last)]
    for first in range(last + 1):
        fresh = BucketOrder(order.buckets, batch_size, order.wraps, order.seed)
        parts: list[list[list[int]]] = []
        for rank in range(world):
            sampler = StepSampler(Share(batch_size, rank, world, micro), first, last, fresh.size_of)
            batches = iter(sampler)
            parts.append([[p for _ in range(count) for p in next(batches)] for count in sampler.counts()])
            assert next(batches, None) is None
        steps = [[p for part in parts for p in part[turn]] for turn in range(last - first)]
        assert [[fresh.locate(p) for p in positions] for positions in steps] == whole[first:]


def test_short_steps_say_their_size_and_have_no_more() -> None:
    order = BucketOrder(np.array([0, 0, 0, 0, 0, 1, 1]), 4, wraps=False, seed=0)
    sizes = [order.size_of(step) for step in range(order.steps_per_epoch)]
    assert sorted(sizes) == [1, 2, 4]
    assert order.mean_batch_size == 7 / 3
    with pytest.raises(IndexError, match=r"has only 1 samples"):
        order.locate(sizes.index(1) * 4 + 1)


def test_a_process_without_a_sample_of_a_short_step_has_no_micro_batch() -> None:
    parts = [micro_batches(5, Share(4, rank, 3, 2), samples=2) for rank in range(3)]
    assert parts == [[[20]], [[21]], []]


def test_batches_of_buckets_are_shuffled_together_anew_each_epoch() -> None:
    order = BucketOrder(np.repeat([0, 1], 40), 2, wraps=True, seed=0)
    steps = order.steps_per_epoch
    rows = [
        tuple(int(order.buckets[turns(order, epoch * steps + step)[0].sample]) for step in range(steps))
        for epoch in range(3)
    ]
    assert len(set(rows)) == 3
    for row in rows:
        changes = sum(first != second for first, second in pairwise(row))
        # Of 39 neighbours each differs with odds 20/39: 20 in the mean; below 8 has odds under 1e-4.
        assert changes >= 8


def test_the_first_of_a_small_bucket_is_not_always_the_one_shown_twice() -> None:
    order = BucketOrder(np.zeros(3, dtype=np.int64), 4, wraps=True, seed=0)
    again = {turns(order, epoch)[3].sample for epoch in range(20)}  # one missed: 3 × (2/3)^20 < 1e-3, once
    assert again == {0, 1, 2}


def test_bucket_order_is_pinned() -> None:
    # A change of these numbers changes what every resumed run sees next.
    order = BucketOrder(np.array([0, 1, 0, 0, 1]), 2, wraps=True, seed=0)
    found = [[(turn.sample, turn.chance) for turn in turns(order, step)] for step in range(6)]
    assert found == [
        [(3, 3), (2, 2)],
        [(0, 0), (3, 8)],
        [(4, 4), (1, 1)],
        [(3, 3), (2, 7)],
        [(2, 2), (0, 0)],
        [(4, 4), (1, 1)],
    ]


def test_without_buckets_the_stream_is_as_it_was() -> None:
    order = StreamOrder(7, 4, 3)
    expected = [(epoch, sample) for epoch in range(4) for sample in permutation(3, epoch, 7).tolist()]
    assert [order.locate(position)[:2] for position in range(28)] == expected
    assert [turn.chance for turn in turns(order, 2)] == [turn.sample for turn in turns(order, 2)]
    assert [order.epochs_before(step) for step in range(4)] == [0, 0, 1, 1]
