"""The loss of a micro-batch: the family makes latents, condition and prediction; diffusion/ does the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_kit.data import Batch
from lora_kit.diffusion import (
    Draws,
    add_noise,
    alphas_cumprod,
    masked_mean,
    min_snr_weight,
    signal_to_noise,
    target,
)
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
    """Mean and deviation [b, c, h, w] of each sample's latent: as they are kept, or the VAE's."""
    if batch.pixels is None:
        assert batch.latent_mean is not None and batch.latent_std is not None
        return batch.latent_mean, batch.latent_std
    nn.Module.to(bundle.vae, batch.pixels.device)  # it may have waited on the CPU
    made = bundle.family.encode(bundle, batch.pixels)
    if batch.latent_mean is None or batch.latent_std is None:
        return made
    kept = (batch.latent_mean, batch.latent_std)
    return _in_order(kept[0], made[0], batch.is_latent), _in_order(kept[1], made[1], batch.is_latent)


class Noised(NamedTuple):
    """The network's inputs for b samples, and what they were made of; on the base's device."""

    clean: Tensor
    """z_0 [b, c, h, w]."""
    noise: Tensor
    noisy: Tensor
    """z_t."""
    timesteps: Tensor
    """int64 [b]."""
    alpha_bar: Tensor
    """ᾱ_t, float64 [b], on the CPU."""

    def rows(self, rows: list[int]) -> Noised:
        """Those of some samples."""
        return Noised(*(part[rows] for part in self))


def noised_latents(objective: Objective, bundle: ModelBundle, moments: tuple[Tensor, Tensor], draws: Draws) -> Noised:
    """Sample the latents and add the draws' noise at their timesteps."""
    mean, std = moments
    noise, timesteps = draws.noise.to(mean.device), draws.timesteps.to(mean.device)
    clean = bundle.family.target_latents(bundle, mean, std, draws.posterior_noise.to(mean.device))
    alpha_bar = objective.alpha_bars[draws.timesteps]
    noisy = add_noise(clean, noise, alpha_bar.float().to(mean.device))
    return Noised(clean, noise, noisy, timesteps, alpha_bar)


def wanted_prediction(bundle: ModelBundle, noised: Noised) -> Tensor:
    """What the network should have predicted, [b, c, h, w]."""
    alpha_bar = noised.alpha_bar.float().to(noised.noise.device)
    return target(bundle.prediction_type, noised.clean, noised.noise, alpha_bar)


def sample_losses(
    objective: Objective, bundle: ModelBundle, noised: Noised, condition: Any, wanted: Tensor, masks: Tensor | None
) -> Tensor:
    """Weighted mean squared error of each sample, float32 [b]. masks: as `Batch.masks`."""
    prediction = bundle.family.predict(bundle, noised.noisy, noised.timesteps, condition)
    errors = (prediction.float() - wanted).square()
    losses = masked_mean(errors, masks, objective.section.unmasked_weight)
    gamma = objective.section.min_snr_gamma
    if gamma is None:
        return losses
    weights = min_snr_weight(signal_to_noise(noised.alpha_bar), gamma, bundle.prediction_type)
    return losses * weights.float().to(losses.device)


def _in_order(kept: Tensor, made: Tensor, is_kept: Tensor) -> Tensor:
    joined = kept.new_empty(len(is_kept), *kept.shape[1:])
    joined[is_kept], joined[~is_kept] = kept, made.to(kept.dtype)
    return joined
