"""The losses against plain float64 formulas, and their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lora_kit.diffusion import alphas_cumprod, elementwise_loss, rescale_zero_terminal_snr, thresholds

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
ALPHA_BARS = alphas_cumprod(STABLE_DIFFUSION)
ERRORS = torch.tensor([[-3.0, -0.2, 0.0], [1e-4, 0.1, 40.0]], dtype=torch.float64)


def formula(loss: str, e: float, c: float) -> float:
    """As the papers write them."""
    root = math.sqrt(e * e + c * c) - c
    return {"l2": e * e, "l1": abs(e), "huber": 2 * c * root, "smooth_l1": 2 * root}[loss]


@pytest.mark.parametrize("loss", ["l2", "l1", "huber", "smooth_l1"])
def test_every_loss_is_its_formula(loss: str):
    c = torch.tensor([0.1, 0.7], dtype=torch.float64)
    found = elementwise_loss(loss, ERRORS, c if loss in ("huber", "smooth_l1") else None)
    wanted = [[formula(loss, float(e), float(c[row])) for e in errors] for row, errors in enumerate(ERRORS)]
    # The formula subtracts c from a number that differs from it by e²/2c: it loses c²/e² · 2^-53 of 1e-4² at worst.
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0.7**2 / 1e-8 * 2**-52)


@pytest.mark.parametrize("loss", ["huber", "smooth_l1"])
def test_small_errors_keep_their_digits_in_fp32(loss: str):
    """In fp32 √(e² + c²) - c of e = 1e-5, c = 1 is 0: the network would learn nothing from it."""
    e, c = 1e-5, 1.0
    found = elementwise_loss(loss, torch.full((1, 1), e), torch.tensor([c]))
    assert found.item() == pytest.approx(e * e, rel=8 * 2**-24)  # a handful of roundings
    assert torch.sqrt(torch.tensor(e).square() + c * c) - c == 0


def test_huber_is_squared_near_zero_and_absolute_far_away():
    c = torch.tensor([0.1])
    near, far = torch.tensor([[1e-4]]), torch.tensor([[1e4]])
    assert elementwise_loss("huber", near, c).item() == pytest.approx(1e-8, rel=1e-5)
    assert elementwise_loss("huber", far, c).item() == pytest.approx(2 * 0.1 * 1e4, rel=2e-5)
    assert elementwise_loss("smooth_l1", far, c).item() == pytest.approx(2e4, rel=2e-5)


def test_thresholds_are_sd_scripts_formulas():
    c, sigma = 0.1, ((1 - ALPHA_BARS.numpy()) / ALPHA_BARS.numpy()) ** 0.5
    wanted = {
        "constant": np.full(1000, c),
        "exponential": np.exp(math.log(c) / 1000 * np.arange(1000)),
        "snr": (1 - c) / (1 + sigma) ** 2 + c,
    }
    for schedule, curve in wanted.items():
        np.testing.assert_allclose(thresholds(schedule, c, ALPHA_BARS).numpy(), curve, rtol=1e-12)


def test_thresholds_go_from_squared_at_little_noise_to_c_at_the_noisy_end():
    exponential, snr = (thresholds(name, 0.1, ALPHA_BARS) for name in ("exponential", "snr"))
    assert exponential[0] == 1
    assert exponential[-1].item() == pytest.approx(0.1, rel=0.003)  # T - 1 of T
    assert 0.94 < snr[0] < 1  # σ_0 = 0.029
    assert 0.1 < snr[-1] < 0.11
    assert (exponential.diff() < 0).all() and (snr.diff() < 0).all()


def test_the_snr_threshold_at_zero_terminal_snr_is_c_itself():
    assert thresholds("snr", 0.1, rescale_zero_terminal_snr(ALPHA_BARS))[-1] == 0.1
