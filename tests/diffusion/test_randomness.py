"""Draws derive from (seed, step, sample) and nothing else."""

import math

import torch

from lora_kit.diffusion import draw_for_samples, generator_for, seed_for, stratified_timesteps


def test_a_samples_draws_do_not_depend_on_how_the_batch_is_cut():
    whole = draw_for_samples(7, 3, range(6), (4, 2, 2), 1000)
    parts = [draw_for_samples(7, 3, part, (4, 2, 2), 1000) for part in ([0, 1], [2], [3, 4, 5])]
    for name in ("noise", "posterior_noise", "timesteps", "offsets"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_other_seeds_steps_and_positions_draw_otherwise():
    first = draw_for_samples(0, 0, [0], (4, 4, 4), 1000).noise
    others = [draw_for_samples(*key, (4, 4, 4), 1000).noise for key in ((1, 0, [0]), (0, 1, [0]), (0, 0, [1]))]
    assert not any(torch.equal(first, other) for other in others)


def test_the_global_generator_is_not_touched():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    draw_for_samples(0, 0, range(3), (4, 2, 2), 1000, noise_offset=0.1)
    assert torch.equal(before, torch.get_rng_state())


def test_words_are_kept_apart():
    assert len({seed_for(1, 23), seed_for(12, 3), seed_for("1", "2", "3"), seed_for(123)}) == 4


def test_noise_offset_shifts_whole_channels_by_its_deviation():
    plain = draw_for_samples(0, 0, range(2000), (4, 2, 2), 1000)
    offset = draw_for_samples(0, 0, range(2000), (4, 2, 2), 1000, noise_offset=0.5)
    shift = offset.noise - plain.noise
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), rtol=0, atol=1e-6)
    constants = shift[..., 0, 0].flatten()
    # Deviation of a sample deviation of n normals is σ / √(2n); five of them.
    assert abs(constants.std().item() - 0.5) < 5 * 0.5 / math.sqrt(2 * len(constants))


def test_timesteps_cover_the_schedule_evenly():
    times = draw_for_samples(0, 0, range(5000), (1, 1, 1), 10).timesteps
    counts = torch.bincount(times, minlength=10)
    assert len(counts) == 10
    # Binomial(5000, 0.1): deviation √450; five of them.
    assert (counts - 500).abs().max() < 5 * math.sqrt(450)


def test_stratified_timesteps_have_one_in_each_part():
    times = stratified_timesteps(4, 1000, generator_for(0))
    assert [int(t) // 250 for t in times] == [0, 1, 2, 3]
