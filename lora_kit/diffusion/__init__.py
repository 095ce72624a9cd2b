"""The diffusion objective as pure functions: one equation each."""

from lora_kit.diffusion.losses import elementwise_loss, thresholds
from lora_kit.diffusion.noises import adaptive_offset, offset_noise, perturbed, pyramid_noise
from lora_kit.diffusion.noising import add_noise, target
from lora_kit.diffusion.randomness import (
    Draws,
    PyramidShape,
    draw_for_samples,
    generator_for,
    perturbation_for_samples,
    pyramid_for_samples,
    seed_for,
    strata_of_step,
    stratified_timesteps,
    uniforms_for_samples,
)
from lora_kit.diffusion.schedule import alphas_cumprod, rescale_zero_terminal_snr, signal_to_noise
from lora_kit.diffusion.weights import (
    debiased_weight,
    masked_mean,
    min_snr_weight,
    p2_weight,
    soft_min_snr_weight,
    v_as_epsilon_weight,
)

__all__ = [
    "Draws",
    "PyramidShape",
    "adaptive_offset",
    "add_noise",
    "alphas_cumprod",
    "debiased_weight",
    "draw_for_samples",
    "elementwise_loss",
    "generator_for",
    "masked_mean",
    "min_snr_weight",
    "offset_noise",
    "p2_weight",
    "perturbation_for_samples",
    "perturbed",
    "pyramid_for_samples",
    "pyramid_noise",
    "rescale_zero_terminal_snr",
    "seed_for",
    "signal_to_noise",
    "soft_min_snr_weight",
    "strata_of_step",
    "stratified_timesteps",
    "target",
    "thresholds",
    "uniforms_for_samples",
    "v_as_epsilon_weight",
]
