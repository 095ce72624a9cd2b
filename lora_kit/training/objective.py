"""The loss of a micro-batch: the family makes latents, condition and prediction; diffusion/ does the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lora_kit.data import Batch
from lora_kit.diffusion import Draws, add_noise, alphas_cumprod, min_snr_weight, signal_to_noise, target
from lora_kit.models import ModelBundle
from lora_kit.recipe import ObjectiveSection

Condition = Callable[[Sequence[str]], Any]


class Objective(NamedTuple):
    """What is minimised, with the schedule it was derived from."""

    section: ObjectiveSection
    alpha_bars: Tensor
    """ᾱ, float64 [T], on the CPU."""


def build_objective(section: ObjectiveSection, bundle: ModelBundle) -> Objective:
    """The objective on the base's own noise schedule."""
    return Objective(section, alphas_cumprod(bundle.scheduler_config))


def latent_moments(bundle: ModelBundle, batch: Batch) -> tuple[Tensor, Tensor]:
    """The cached mean and deviation [b, c, h, w], or the VAE's."""
    if batch.latent_mean is not None and batch.latent_std is not None:
        return batch.latent_mean, batch.latent_std
    assert batch.pixels is not None
    return bundle.family.encode(bundle, batch.pixels)


def sample_losses(
    objective: Objective, bundle: ModelBundle, moments: tuple[Tensor, Tensor], condition: Any, draws: Draws
) -> Tensor:
    """Weighted mean squared error of each sample, float32 [b]."""
    mean, std = moments
    noise, timesteps = draws.noise.to(mean.device), draws.timesteps.to(mean.device)
    z0 = bundle.family.target_latents(bundle, mean, std, draws.posterior_noise.to(mean.device))
    alpha_bar = objective.alpha_bars[draws.timesteps]
    on_device = alpha_bar.float().to(mean.device)
    noisy = add_noise(z0, noise, on_device)
    prediction = bundle.family.predict(bundle, noisy, timesteps, condition)
    wanted = target(bundle.prediction_type, z0, noise, on_device)
    losses = (prediction.float() - wanted).square().mean(dim=(1, 2, 3))
    gamma = objective.section.min_snr_gamma
    if gamma is None:
        return losses
    weights = min_snr_weight(signal_to_noise(alpha_bar), gamma, bundle.prediction_type)
    return losses * weights.float().to(losses.device)
