"""The diffusion equations against independent float64 computations and diffusers' own."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from lora_kit.diffusion import add_noise, alphas_cumprod, min_snr_weight, signal_to_noise, target
from lora_kit.errors import ModelError

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def independent_alpha_bars() -> np.ndarray:
    betas = [(math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / 999) ** 2 for t in range(1000)]
    return np.exp(np.cumsum(np.log1p(-np.array(betas))))


def test_stable_diffusions_schedule_is_the_product_of_one_minus_beta():
    # 1000 products of numbers near 1, each rounded once: 1000 × 2^-53 relative.
    np.testing.assert_allclose(alphas_cumprod(STABLE_DIFFUSION).numpy(), independent_alpha_bars(), rtol=1000 * 2**-53)


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_every_schedule_is_diffusers_own_within_fp32(name):
    config = STABLE_DIFFUSION | {"beta_schedule": name}
    theirs = DDPMScheduler(**config).alphas_cumprod.double()
    # Theirs is a product of 1000 fp32 factors, each rounded: 1000 × 2^-24 relative.
    torch.testing.assert_close(alphas_cumprod(config), theirs, rtol=1000 * 2**-24, atol=1e-7)


def test_an_unknown_schedule_is_named_with_the_known_ones():
    with pytest.raises(ModelError, match=r"'sigmoid'.*scaled_linear"):
        alphas_cumprod(STABLE_DIFFUSION | {"beta_schedule": "sigmoid"})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_recovers_the_clean_latents_in_diffusers_sampler(prediction_type):
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, prediction_type=prediction_type)
    scheduler.set_timesteps(1000)
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, 1, 4, 3, 3, generator=generator, dtype=torch.float64)
    alpha_bar = alphas_cumprod(STABLE_DIFFUSION)[[499]]
    noisy = add_noise(z0, noise, alpha_bar)
    found = scheduler.step(target(prediction_type, z0, noise, alpha_bar), 499, noisy).pred_original_sample
    # Their ᾱ is fp32 with the error of 500 factors; z0 = (z_t - √(1-ᾱ) ε) / √ᾱ magnifies it by about 1 / ᾱ.
    torch.testing.assert_close(found, z0, rtol=0, atol=10 * 500 * 2**-24 / alpha_bar.item())


def test_noised_latents_have_unit_variance_when_the_clean_ones_have():
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, 4, 4, 64, 64, generator=generator)
    noisy = add_noise(z0, noise, torch.tensor([0.0, 0.1, 0.5, 1.0]))
    # Deviation of a sample variance of n normals is √(2/n); five of them.
    assert (noisy.var(dim=(1, 2, 3)) - 1).abs().max() < 5 * math.sqrt(2 / z0[0].numel())


def test_an_unknown_prediction_type_is_refused():
    z = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ModelError, match="epsilon, v_prediction, sample"):
        target("score", z, z, torch.ones(1))


def test_min_snr_weighs_the_clean_latents_error_by_min_snr_gamma_for_both_targets():
    # An error e of ε is an error √((1-ᾱ)/ᾱ)·e of z0, one of v is √(1-ᾱ)·e: the weighted squared error must be
    # min(SNR, γ) times that of z0 in both (Hang et al. 2023, section 3.4).
    alpha_bar = alphas_cumprod(STABLE_DIFFUSION)
    snr, gamma = signal_to_noise(alpha_bar), 5.0
    wanted = torch.minimum(snr, torch.full_like(snr, gamma))
    per_z0 = {"epsilon": (1 - alpha_bar) / alpha_bar, "v_prediction": 1 - alpha_bar}
    for prediction_type, z0_error in per_z0.items():
        weight = min_snr_weight(snr, gamma, prediction_type)
        torch.testing.assert_close(weight, wanted * z0_error, rtol=1e-12, atol=0)


def test_min_snr_leaves_noisy_timesteps_of_an_epsilon_model_alone():
    snr = torch.tensor([100.0, 5.0, 0.1], dtype=torch.float64)
    assert min_snr_weight(snr, 5.0, "epsilon").tolist() == [0.05, 1.0, 1.0]
