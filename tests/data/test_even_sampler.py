"""Equally many micro-batches in every process, for networks that run in all processes or in none."""

from __future__ import annotations

import pytest

from lora_kit.data.sampler import Share, StepSampler


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_processes_have_equally_many_and_each_sample_counts_once(samples, world):
    steps, batch = 3, 7
    samplers = [
        StepSampler(Share(batch, rank, world, 2), 0, steps, lambda step: samples, even=True) for rank in range(world)
    ]
    counts = [list(sampler.counts()) for sampler in samplers]
    assert all(count == counts[0] for count in counts)
    counting = {step: [] for step in range(steps)}
    for sampler, own in zip(samplers, counts, strict=True):
        batches = iter(sampler)
        for step, (count, fillers) in enumerate(zip(own, sampler.fillers(), strict=True)):
            found = [next(batches) for _ in range(count)]
            counting[step] += [position for one in found[: count - fillers] for position in one]
            assert all(one == [step * batch] for one in found[count - fillers :])
        assert next(batches, None) is None
    assert all(sorted(counting[step]) == [step * batch + i for i in range(samples)] for step in range(steps))
