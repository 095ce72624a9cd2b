"""Order and chance are pure functions; a step's positions are shared out without gap or overlap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_kit.data import Share, StepSampler, micro_batches
from lora_kit.data.order import chances, permutation
from lora_kit.errors import RecipeError


def test_permutation_holds_every_sample_once() -> None:
    assert sorted(permutation(3, 5, 1000).tolist()) == list(range(1000))


def test_permutation_is_pinned() -> None:
    # A change of these numbers changes what every resumed run sees next.
    assert permutation(0, 0, 8).tolist() == [3, 4, 7, 6, 2, 1, 5, 0]
    assert [round(value, 12) for value in chances(0, 0, 0)] == [
        0.181676259979,
        0.954983675454,
        0.791366113466,
        0.837692537686,
    ]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permutation(seed, epoch, 50).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_first_place_is_uniform() -> None:
    # 5 sigma of a binomial with n = 4000, p = 1/8.
    firsts = np.bincount([permutation(seed, 0, 8)[0] for seed in range(4000)], minlength=8)
    assert np.abs(firsts - 500).max() < 5 * math.sqrt(4000 / 8 * 7 / 8)


def test_chances_are_uniform_and_uncorrelated() -> None:
    draws = np.array([chances(0, epoch, sample) for epoch in range(40) for sample in range(100)])
    count = len(draws)
    assert draws.min() >= 0
    assert draws.max() < 1
    # 5 sigma: a uniform's deviation is √(1/12), a sample correlation's 1/√n.
    assert np.abs(draws.mean(0) - 0.5).max() < 5 * math.sqrt(1 / 12 / count)
    correlations = np.corrcoef(draws.T) - np.eye(draws.shape[1])
    assert np.abs(correlations).max() < 5 / math.sqrt(count)


shares = st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9)).filter(lambda s: s[0] >= s[1])


@given(shares, st.integers(0, 10**9))
def test_all_processes_together_take_each_position_once(share: tuple[int, int, int], step: int) -> None:
    batch_size, world, micro = share
    parts = [micro_batches(step, Share(batch_size, rank, world, micro)) for rank in range(world)]
    flat = [position for part in parts for batch in part for position in batch]
    assert flat == list(range(step * batch_size, (step + 1) * batch_size))


@given(shares)
def test_shares_and_micro_batches_are_balanced(share: tuple[int, int, int]) -> None:
    batch_size, world, micro = share
    parts = [micro_batches(0, Share(batch_size, rank, world, micro)) for rank in range(world)]
    sizes = [sum(map(len, part)) for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    for part in parts:
        lengths = [len(batch) for batch in part]
        assert max(lengths) <= micro
        assert max(lengths) - min(lengths) <= 1


def test_more_processes_than_pictures_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"data.batch_size \(2\) is below the number of processes \(3\)"):
        Share(2, 0, 3, 1)


def test_sampler_goes_on_where_it_is_told() -> None:
    share = Share(5, 1, 2, 1)
    whole = list(StepSampler(share, 0, 7))
    rest = StepSampler(share, 3, 7)
    assert rest.per_step == 2
    assert list(rest) == whole[3 * rest.per_step :]
    assert len(rest) == len(list(rest)) == 8


def test_sampler_of_a_finished_run_is_empty() -> None:
    sampler = StepSampler(Share(4, 0, 1, 4), 9, 7)
    assert (len(sampler), list(sampler)) == (0, [])
