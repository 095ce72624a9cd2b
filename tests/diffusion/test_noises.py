"""Other noise than white: variance, spectrum, and that each option draws from a generator of its own."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import interpolate

from lora_kit.diffusion import (
    PyramidShape,
    adaptive_offset,
    draw_for_samples,
    generator_for,
    offset_noise,
    perturbation_for_samples,
    perturbed,
    pyramid_for_samples,
)

SHAPE = (4, 32, 24)


def pyramids(levels: int, discount: float, positions: list[int], step: int = 0) -> torch.Tensor:
    noise = draw_for_samples(0, step, positions, SHAPE, 1000).noise
    return pyramid_for_samples(noise, 0, step, positions, PyramidShape(levels, discount))


def spectrum(noise: torch.Tensor) -> torch.Tensor:
    """Mean power in five rings of spatial frequency, coarse to fine, per cell; 1 everywhere for white noise."""
    power = torch.fft.fft2(noise.double()).abs().square().mean(dim=(0, 1)) / (SHAPE[1] * SHAPE[2])
    rows, columns = torch.fft.fftfreq(SHAPE[1]), torch.fft.fftfreq(SHAPE[2])
    radius = (rows[:, None].square() + columns[None].square()).sqrt()
    edges = [0.0, 0.06, 0.12, 0.2, 0.3, 0.5]
    return torch.stack([power[(radius >= low) & (radius < high)].mean() for low, high in pairwise(edges)])


def test_pyramid_noise_has_unit_deviation_in_every_sample():
    noise = pyramids(6, 0.5, list(range(16)))
    found = noise.double().std(dim=(1, 2, 3))
    # Divided by a deviation that was summed over 3072 fp32 squares: a few roundings of the pairwise sum.
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=32 * 2**-24)


def test_pyramid_noise_is_its_formula():
    """Written out in float64 from the same draws: white noise, then each level's factor and grid."""
    positions, levels, discount = [3, 11], 3, 0.4
    found = pyramids(levels, discount, positions, step=5)
    for one, position in zip(found, positions, strict=True):
        total = draw_for_samples(0, 5, [position], SHAPE, 1000).noise[0].double()
        generator = generator_for(0, "pyramid", 5, position)
        for level in range(levels):
            ratio = (torch.rand((), generator=generator).item() * 2 + 2) ** level
            coarse = torch.randn(1, 4, int(32 / ratio), int(24 / ratio), generator=generator).double()
            grown = interpolate(coarse, SHAPE[1:], mode="bilinear", align_corners=False)[0]
            total += discount**level * grown
        centred = total - total.mean()
        deviation = (centred.square().sum() / (total.numel() - 1)).sqrt()
        torch.testing.assert_close(one.double(), total / deviation, rtol=0, atol=64 * 2**-24)


def test_pyramid_noise_has_more_of_the_coarse_and_less_of_the_fine_than_white_noise():
    positions = list(range(200))
    white = spectrum(draw_for_samples(0, 0, positions, SHAPE, 1000).noise)
    coloured = spectrum(pyramids(8, 0.8, positions))
    # The coarsest ring has 9 of 768 frequencies, so half of 9 × 4 × 200 exponential powers: five deviations.
    torch.testing.assert_close(white, torch.ones_like(white), rtol=0, atol=5 / math.sqrt(9 * 4 * 200 / 2))
    assert (coloured.diff() < 0).all()  # falls from ring to ring
    assert coloured[0] > 3 and coloured[-1] < 1


def test_a_smaller_discount_is_nearer_to_white_noise():
    powers = [spectrum(pyramids(6, discount, list(range(64))))[0] for discount in (0.1, 0.3, 0.6, 0.9)]
    assert all(low < high for low, high in pairwise(powers))


def test_levels_that_do_not_fit_are_not_made():
    """From 2 × 2 cells the first coarser grid is one cell: the same as a constant for each channel."""
    noise = draw_for_samples(0, 0, [0], (4, 2, 2), 1000).noise
    two, many = (pyramid_for_samples(noise, 0, 0, [0], PyramidShape(levels, 0.5)) for levels in (2, 16))
    assert torch.equal(two, many)


def test_a_samples_pyramid_depends_on_seed_step_and_position_alone():
    whole = pyramids(6, 0.5, [0, 1, 2, 3])
    assert torch.equal(torch.cat([pyramids(6, 0.5, [2, 3]), pyramids(6, 0.5, [0])]), whole[[2, 3, 0]])
    assert not torch.equal(pyramids(6, 0.5, [0], step=1), whole[:1])


def test_the_draws_of_a_sample_are_those_they_always_were():
    """One generator of (seed, "sample", step, position): timestep, noise, posterior noise, then the offset. Runs that
    were begun before there were other options go on with the same bits."""
    draws = draw_for_samples(5, 7, [2], (4, 3, 3), 1000, noise_offset=0.1)
    generator = generator_for(5, "sample", 7, 2)
    timestep = torch.randint(1000, (), generator=generator)
    noise, posterior = (torch.randn(4, 3, 3, generator=generator) for _ in range(2))
    offset = torch.randn(4, 1, 1, generator=generator)
    assert draws.timesteps[0] == timestep
    assert torch.equal(draws.posterior_noise[0], posterior)
    assert torch.equal(draws.noise[0], noise + 0.1 * offset)
    assert torch.equal(draw_for_samples(5, 7, [2], (4, 3, 3), 1000).noise[0], noise)


def test_adaptive_offset_is_scaled_by_each_channels_mean():
    z0 = (
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        + torch.tensor([-2.0, 0, 1, 3])[:, None, None]
    )
    found = adaptive_offset(z0, 0.05, 0.02)
    wanted = 0.05 + 0.02 * z0.double().numpy().mean(axis=(2, 3)).__abs__()
    assert found.shape == (3, 4, 1, 1)
    # A mean of 64 fp32 numbers of about 4: 8 × 2^-24 each.
    torch.testing.assert_close(found[..., 0, 0].double(), torch.from_numpy(wanted), rtol=0, atol=64 * 2**-24)
    assert (adaptive_offset(z0, 0.01, -0.02)[:, [0, 3]] == 0).all()  # |mean| is 2 and 3: 0.01 - 0.04 and less
    assert (adaptive_offset(z0, 0.01, -0.02) >= 0).all()


def test_offset_noise_is_one_constant_per_channel():
    noise, constants = torch.zeros(2, 4, 3, 3), torch.randn(2, 4, 1, 1)
    assert torch.equal(offset_noise(noise, constants, 0.5), 0.5 * constants.expand(2, 4, 3, 3))


def test_perturbation_raises_the_inputs_noise_and_draws_nothing_else():
    positions = list(range(300))
    noise = draw_for_samples(0, 0, positions, SHAPE, 1000).noise
    other = perturbation_for_samples(0, 0, positions, SHAPE)
    seen = perturbed(noise, other, 0.1)
    # Variance 1 + γ² (Ning et al. 2023); of n normals' sample variance the deviation is √(2/n), five of them.
    assert seen.var().item() == pytest.approx(1.01, abs=5 * 1.01 * math.sqrt(2 / seen.numel()))
    correlation = (noise * other).mean().item()
    assert abs(correlation) < 5 / math.sqrt(noise.numel())
    assert torch.equal(perturbation_for_samples(0, 0, [7], SHAPE)[0], other[7])
