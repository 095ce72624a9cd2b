"""Loss weights: the papers' values, and the same objective whatever the network predicts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_kit.diffusion import (
    add_noise,
    alphas_cumprod,
    debiased_weight,
    min_snr_weight,
    p2_weight,
    rescale_zero_terminal_snr,
    signal_to_noise,
    soft_min_snr_weight,
    target,
    v_as_epsilon_weight,
)

ALPHA_BARS = alphas_cumprod(
    {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
WEIGHTS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "min-SNR": lambda snr, kind: min_snr_weight(snr, 5.0, kind),
    "soft min-SNR": lambda snr, kind: soft_min_snr_weight(snr, 4.0, kind),
    "debiased": debiased_weight,
    "P2": lambda snr, kind: p2_weight(snr, 0.5, 1.0, kind),
}


def clean_from(prediction_type: str, predicted: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """z_0 as a sampler makes it of a prediction; written from z_t = √ᾱ z_0 + √(1-ᾱ) ε alone."""
    a, s = (x.view(-1, 1, 1, 1) for x in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    return {
        "epsilon": lambda: (noisy - s * predicted) / a,
        "v_prediction": lambda: a * noisy - s * predicted,
        "sample": lambda: predicted,
    }[prediction_type]()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_is_the_same_objective_whatever_the_network_predicts(name: str):
    """A wrong z_0, told as ε, v or z_0, costs the same after weighting: found through the sampler's own equations, in
    float64, at a hundred timesteps from the first to the last."""
    alpha_bar = ALPHA_BARS[:: len(ALPHA_BARS) // 100]
    generator = torch.Generator().manual_seed(0)
    z0, noise, mistake = torch.randn(3, len(alpha_bar), 4, 2, 2, generator=generator, dtype=torch.float64)
    noisy = add_noise(z0, noise, alpha_bar)
    wrong = z0 + 0.1 * mistake
    a = alpha_bar.view(-1, 1, 1, 1)
    wrong_noise = (noisy - a.sqrt() * wrong) / (1 - a).sqrt()
    losses = []
    for kind in PREDICTIONS:
        predicted = target(kind, wrong, wrong_noise, alpha_bar)
        torch.testing.assert_close(clean_from(kind, predicted, noisy, alpha_bar), wrong, rtol=0, atol=1e-12)
        squared = (predicted - target(kind, z0, noise, alpha_bar)).square().mean(dim=(1, 2, 3))
        losses.append(squared * WEIGHTS[name](signal_to_noise(alpha_bar), kind))
    # ε of the first timestep is a difference magnified by √SNR = 34: 1e-12 is a thousand roundings and more.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-11, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-11, atol=0)


def test_each_weight_is_its_papers_formula_for_the_noise():
    """On the error of ε, at SD's timesteps, in plain numpy."""
    snr = (ALPHA_BARS / (1 - ALPHA_BARS)).numpy()
    papers = {
        "min-SNR": np.minimum(snr, 5) / snr,  # Hang et al. 2023
        "soft min-SNR": 4 / (snr + 4),  # Crowson et al. 2024: 4 SNR / (SNR + 4) on z_0
        "debiased": 1 / np.sqrt(snr),  # Yu et al. 2023
        "P2": 1 / (1 + snr) ** 0.5,  # Choi et al. 2022
    }
    for name, wanted in papers.items():
        np.testing.assert_allclose(WEIGHTS[name](torch.from_numpy(snr), "epsilon").numpy(), wanted, rtol=1e-14)


def test_min_snr_has_the_papers_corner_and_ends_on_stable_diffusions_schedule():
    """SNR falls from 1175 at t = 0 through γ = 5 between t = 146 and 147 to 0.0047 at t = 999."""
    snr = signal_to_noise(ALPHA_BARS)
    weight = {kind: min_snr_weight(snr, 5.0, kind) for kind in PREDICTIONS}
    first_below = int((snr < 5).nonzero()[0])
    assert first_below == 147
    assert snr[0].item() == pytest.approx(1 / 0.00085 - 1, rel=1e-12)
    assert weight["epsilon"][0].item() == pytest.approx(5 / (1 / 0.00085 - 1), rel=1e-12)  # 0.0043
    assert (weight["epsilon"][first_below:] == 1).all() and (weight["epsilon"][:first_below] < 1).all()
    assert weight["v_prediction"].argmax() in (first_below - 1, first_below)
    assert weight["v_prediction"].max().item() == pytest.approx(5 / 6, rel=0.01)  # γ / (γ + 1) at SNR = γ
    assert weight["sample"][0] == 5
    assert weight["sample"][-1] == snr[-1]
    at_gamma = torch.tensor([5.0], dtype=torch.float64)
    assert [min_snr_weight(at_gamma, 5.0, kind).item() for kind in PREDICTIONS] == [1, 5 / 6, 5]
    assert soft_min_snr_weight(at_gamma, 5.0, "sample").item() == 2.5


def test_soft_min_snr_keeps_below_min_snr_and_within_half_of_it():
    snr = signal_to_noise(ALPHA_BARS)
    ratio = soft_min_snr_weight(snr, 5.0, "epsilon") / min_snr_weight(snr, 5.0, "epsilon")
    assert (ratio < 1).all() and (ratio >= 0.5 - 1e-12).all()


def test_v_weighed_as_epsilon_is_the_error_of_epsilon():
    alpha_bar = ALPHA_BARS[[0, 500, 999]]
    snr = signal_to_noise(alpha_bar)
    # |Δv|² = |Δz_0|² / (1 - ᾱ), |Δε|² = |Δz_0|² ᾱ / (1 - ᾱ).
    torch.testing.assert_close(v_as_epsilon_weight(snr), alpha_bar, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_every_weight_is_finite_and_zero_where_there_is_no_signal(kind: str):
    snr = signal_to_noise(rescale_zero_terminal_snr(ALPHA_BARS))
    for weigh in WEIGHTS.values():
        weight = weigh(snr, kind)
        assert torch.isfinite(weight).all()
        assert weight[-1] == 0 and (weight[:-1] > 0).all()
