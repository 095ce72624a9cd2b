"""The loss of a micro-batch: the family makes latents, condition and prediction; diffusion/ does the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lora_kit.data import Batch
from lora_kit.diffusion import (
    Draws,
    PyramidShape,
    adaptive_offset,
    add_noise,
    alphas_cumprod,
    debiased_weight,
    draw_for_samples,
    elementwise_loss,
    generator_for,
    masked_mean,
    min_snr_weight,
    offset_noise,
    p2_weight,
    perturbation_for_samples,
    perturbed,
    pyramid_for_samples,
    signal_to_noise,
    soft_min_snr_weight,
    target,
    thresholds,
    v_as_epsilon_weight,
)
from lora_kit.errors import ModelError
from lora_kit.models import ModelBundle
from lora_kit.models.moving import moved, rows_on
from lora_kit.models.released import bring
from lora_kit.models.schedules import ZERO_TERMINAL_SNR
from lora_kit.recipe import ObjectiveSection
from lora_kit.recipe.objective import check_against_base, weight_name
from lora_kit.training.timesteps import drawn_timesteps

Condition = Callable[[Sequence[str]], Any]


class Objective(NamedTuple):
    """What is minimised, with the schedule it was derived from. Tables over timesteps lie on the CPU."""

    section: ObjectiveSection
    alpha_bars: Tensor
    """ᾱ, float64 [T]."""
    weights: Tensor | None
    """Of each timestep's loss, float64 [T]; None: 1 everywhere."""
    thresholds: Tensor | None
    """The pseudo-Huber losses' c, float64 [T]; None for the other losses."""


def adopt_schedule(section: ObjectiveSection, bundle: ModelBundle) -> None:
    """Check the objective against the base, and put the run's noise schedule into the bundle's `scheduler_config`,
    where the objective and the samplers of validation pictures read it, and a full fine-tune's folder has it from.

    Raises RecipeError where the objective and what the base predicts do not agree, naming all of it.
    """
    count = int(bundle.scheduler_config.get("num_train_timesteps", 1000))
    check_against_base(section, bundle.source, bundle.prediction_type, count)
    if section.zero_terminal_snr:
        bundle.scheduler_config = {**bundle.scheduler_config, **ZERO_TERMINAL_SNR}
    elif bundle.scheduler_config.get("rescale_betas_zero_snr") and bundle.prediction_type == "epsilon":
        raise ModelError(
            f"{bundle.source}: its scheduler config has zero terminal SNR (`rescale_betas_zero_snr: true`) and says "
            "that the network predicts the noise, which cannot be: at the last timestep the noise is all of the input. "
            "Set model.prediction_type to what it predicts, or set that key to false in scheduler_config.json."
        )


def schedule_facts(bundle: ModelBundle) -> dict[str, object]:
    """What a sampler has to know of the run's schedule, for the adapter's header."""
    changed = ZERO_TERMINAL_SNR if bundle.scheduler_config.get("rescale_betas_zero_snr") else {}
    return {"prediction_type": bundle.prediction_type, **changed}


def schedule_notices(bundle: ModelBundle) -> list[str]:
    """What the user should be told once about what the base predicts."""
    said = bundle.scheduler_config.get("prediction_type", "epsilon")
    if said == bundle.prediction_type:
        return []
    return [
        f"model.prediction_type: {bundle.prediction_type} goes over what {bundle.source} says of itself, {said}: "
        "trained, drawn and saved so."
    ]


def build_objective(section: ObjectiveSection, bundle: ModelBundle) -> Objective:
    """The objective on the bundle's noise schedule, as `adopt_schedule` left it."""
    alpha_bars = alphas_cumprod(bundle.scheduler_config)
    robust = section.loss in ("huber", "smooth_l1")
    return Objective(
        section,
        alpha_bars,
        weights=loss_weights(section, alpha_bars, bundle.prediction_type),
        thresholds=thresholds(section.huber_schedule, section.huber_c, alpha_bars) if robust else None,
    )


def objective_notices(objective: Objective) -> list[str]:
    """What the user should be told once about the objective."""
    weights, last = objective.weights, float(objective.alpha_bars[-1])
    if weights is None or last > 0 or float(weights[-1]) > 0:
        return []
    return [
        f"objective.{weight_name(objective.section)} has weight 0 at the last timestep, where there is no signal: "
        "what zero terminal SNR is for is hardly trained. Without a weight it is."
    ]


def loss_weights(section: ObjectiveSection, alpha_bars: Tensor, prediction_type: str) -> Tensor | None:
    """The weight of each timestep's loss that the section asks for, in ᾱ's shape; None: 1 everywhere."""
    snr = signal_to_noise(alpha_bars)
    match weight_name(section):
        case "min_snr_gamma":
            return min_snr_weight(snr, section.min_snr_gamma or 0, prediction_type)
        case "soft_min_snr_gamma":
            return soft_min_snr_weight(snr, section.soft_min_snr_gamma or 0, prediction_type)
        case "debiased":
            return debiased_weight(snr, prediction_type)
        case "p2_gamma":
            return p2_weight(snr, section.p2_gamma or 0, section.p2_k, prediction_type)
        case "v_as_epsilon":
            return v_as_epsilon_weight(snr)
        case _:
            return None


def draw(objective: Objective, seed: int, step: int, batch: Batch, shape: Sequence[int]) -> Draws:
    """All draws of a micro-batch for latents of `shape` [c, h, w]: functions of (seed, step, position) alone."""
    section, positions = objective.section, batch.positions.tolist()
    # The adaptive offset needs the latents: `noised_latents` adds it.
    fixed_offset = 0.0 if section.adaptive_noise_scale else section.noise_offset
    draws = draw_for_samples(seed, step, positions, shape, len(objective.alpha_bars), fixed_offset)
    times = drawn_timesteps(section.timesteps, len(objective.alpha_bars), seed, step, batch)
    if times is not None:
        draws = draws._replace(timesteps=times)
    if section.pyramid_levels:
        pyramid = PyramidShape(section.pyramid_levels, section.pyramid_discount)
        draws = draws._replace(noise=pyramid_for_samples(draws.noise, seed, step, positions, pyramid))
    if section.input_perturbation:
        draws = draws._replace(perturbation=perturbation_for_samples(seed, step, positions, shape))
    return draws


def latent_moments(bundle: ModelBundle, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean and deviation [b, c, h, w] of each sample's latent: as they are kept, or the VAE's."""
    pixels = batch.unencoded
    if pixels is None:
        assert batch.latent_mean is not None and batch.latent_std is not None
        return batch.latent_mean, batch.latent_std
    bring(bundle, "vae", pixels.device)  # it may have waited on the CPU
    made = bundle.family.encode(bundle, pixels)
    if batch.latent_mean is None or batch.latent_std is None:
        return made
    kept = (batch.latent_mean, batch.latent_std)
    sources = batch.is_latent.cpu().nonzero().flatten().tolist(), (~batch.is_latent.cpu()).nonzero().flatten().tolist()
    places = [rows_on(rows, pixels.device) for rows in sources]
    return _in_order(kept[0], made[0], places), _in_order(kept[1], made[1], places)


class Noised(NamedTuple):
    """The network's inputs for b samples, and what they were made of; on the base's device."""

    clean: Tensor
    """z_0 [b, c, h, w]."""
    noise: Tensor
    """ε, which the target is made of."""
    noisy: Tensor
    """z_t."""
    timesteps: Tensor
    """int64 [b]."""
    alpha_bar: Tensor
    """ᾱ_t, float64 [b], on the CPU."""
    host_timesteps: Tensor
    """`timesteps` on the CPU: reading them from a GPU would wait for it."""
    beside: Tensor | None = None
    """What the network is given beside z_t, [b, k, h, w]; None: nothing."""

    def rows(self, rows: list[int]) -> Noised:
        """Those of some samples."""
        own = rows_on(rows, self.noisy.device)
        beside = None if self.beside is None else self.beside[own]
        times = (self.timesteps[own], self.alpha_bar[rows], self.host_timesteps[rows])
        return Noised(self.clean[own], self.noise[own], self.noisy[own], *times, beside)


def beside_latents(bundle: ModelBundle, batch: Batch, words: Sequence[Sequence[int | str]]) -> Tensor | None:
    """What the base's family puts beside the samples' z_t; each draws from a generator seeded by its own `words`."""
    if not bundle.family.needs_pixels:
        return None
    assert batch.pixels is not None and len(batch.pixels) == len(batch.ids), "the data set does not keep pixels"
    generators = [generator_for(*own, "beside") for own in words]
    made = bundle.family.beside(bundle, batch.pixels, batch.holes or [None] * len(batch.ids), generators)
    return None if made is None else moved(made, bundle.device)


def noised_latents(
    objective: Objective,
    bundle: ModelBundle,
    moments: tuple[Tensor, Tensor],
    draws: Draws,
    beside: Tensor | None = None,
) -> Noised:
    """Sample the latents and add the draws' noise at their timesteps. beside: as `Noised`'s."""
    mean, std = moments
    device, section = mean.device, objective.section
    noise, timesteps = moved(draws.noise, device), moved(draws.timesteps, device)
    clean = bundle.family.target_latents(bundle, mean, std, moved(draws.posterior_noise, device))
    if section.adaptive_noise_scale and draws.offsets is not None:
        scale = adaptive_offset(clean, section.noise_offset, section.adaptive_noise_scale)
        noise = offset_noise(noise, moved(draws.offsets, device), scale)
    seen = noise
    if draws.perturbation is not None:
        seen = perturbed(noise, moved(draws.perturbation, device), section.input_perturbation)
    alpha_bar = objective.alpha_bars[draws.timesteps]
    noisy = add_noise(clean, seen, moved(alpha_bar.float(), device))
    return Noised(clean, noise, noisy, timesteps, alpha_bar, draws.timesteps, beside)


def wanted_prediction(bundle: ModelBundle, noised: Noised) -> Tensor:
    """What the network should have predicted, [b, c, h, w]."""
    alpha_bar = moved(noised.alpha_bar.float(), noised.noise.device)
    return target(bundle.prediction_type, noised.clean, noised.noise, alpha_bar)


def sample_losses(
    objective: Objective, bundle: ModelBundle, noised: Noised, condition: Any, wanted: Tensor, masks: Tensor | None
) -> Tensor:
    """Weighted mean loss of each sample, float32 [b]. masks: as `Batch.masks`."""
    prediction = bundle.family.predict(bundle, noised.noisy, noised.timesteps, condition, noised.beside)
    difference = prediction.float() - wanted
    threshold = _at(objective.thresholds, noised, difference)
    errors = elementwise_loss(objective.section.loss, difference, threshold)
    losses = masked_mean(errors, masks, objective.section.unmasked_weight)
    weights = _at(objective.weights, noised, losses)
    return losses if weights is None else losses * weights


def _at(table: Tensor | None, noised: Noised, like: Tensor) -> Tensor | None:
    """A table over timesteps at those of the samples, float32 [b]."""
    return None if table is None else moved(table[noised.host_timesteps].float(), like.device)


def _in_order(kept: Tensor, made: Tensor, places: Sequence[Tensor]) -> Tensor:
    joined = kept.new_empty(len(kept) + len(made), *kept.shape[1:])
    return joined.index_copy_(0, places[0], kept).index_copy_(0, places[1], made.to(kept.dtype))
