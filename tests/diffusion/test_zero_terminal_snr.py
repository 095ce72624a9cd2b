"""Zero terminal SNR: the last timestep is noise alone, the first stays, and everything is derived after it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as diffusers_rescale

from lora_kit.diffusion import add_noise, alphas_cumprod, rescale_zero_terminal_snr, signal_to_noise, target

CONFIG = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PLAIN = alphas_cumprod(CONFIG)
RESCALED = alphas_cumprod(CONFIG | {"rescale_betas_zero_snr": True})


def test_the_last_is_exactly_zero_and_the_first_unchanged():
    assert RESCALED[-1] == 0
    assert RESCALED[0] == PLAIN[0]
    assert (RESCALED.diff() < 0).all()
    assert signal_to_noise(RESCALED)[-1] == 0


def test_it_is_the_papers_algorithm_in_numpy():
    roots = np.sqrt(PLAIN.numpy())
    wanted = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    np.testing.assert_allclose(RESCALED.numpy(), wanted, rtol=1e-15 * 16, atol=0)


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
def test_it_is_diffusers_own_on_the_same_betas(beta_schedule: str):
    ours = alphas_cumprod(CONFIG | {"beta_schedule": beta_schedule})
    betas = 1 - ours / torch.cat([torch.ones(1, dtype=ours.dtype), ours[:-1]])
    theirs = (1 - diffusers_rescale(betas)).cumprod(0)
    # Theirs goes back to betas and their product again: 1000 factors, each rounded. Near the end β is close to 1.
    torch.testing.assert_close(rescale_zero_terminal_snr(ours), theirs, rtol=1e-9, atol=1e-15)


def test_a_rescaled_schedule_stays_as_it_is():
    torch.testing.assert_close(rescale_zero_terminal_snr(RESCALED), RESCALED, rtol=1e-15 * 16, atol=0)


def test_the_last_timesteps_input_is_the_noise_and_its_v_the_picture():
    z0, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    last = RESCALED[[-1]].float()
    assert torch.equal(add_noise(z0, noise, last), noise)
    assert torch.equal(target("v_prediction", z0, noise, last), -z0)
    assert torch.equal(target("sample", z0, noise, last), z0)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_diffusers_sampler_finds_the_picture_from_pure_noise(kind: str):
    """A network that were right at the last timestep gives z_0 at once, on diffusers' rescaled schedule."""
    scheduler = DDIMScheduler(
        **CONFIG, clip_sample=False, prediction_type=kind, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    z0, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    last = RESCALED[[-1]].float()
    found = scheduler.step(target(kind, z0, noise, last), 999, add_noise(z0, noise, last)).pred_original_sample
    torch.testing.assert_close(found, z0, rtol=0, atol=2**-22)


def test_snr_of_the_plain_schedule_ends_where_the_paper_says():
    """Lin et al. 2023, table 1: Stable Diffusion's √ᾱ_T is 0.068265, its terminal SNR 0.004682."""
    assert math.sqrt(PLAIN[-1].item()) == pytest.approx(0.068265, abs=5e-7)
    assert signal_to_noise(PLAIN)[-1].item() == pytest.approx(0.004682, abs=5e-7)
