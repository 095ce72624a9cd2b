"""The diffusion objective as pure functions: one equation each."""

from lora_kit.diffusion.noising import add_noise, target
from lora_kit.diffusion.randomness import Draws, draw_for_samples, generator_for, seed_for, stratified_timesteps
from lora_kit.diffusion.schedule import alphas_cumprod, signal_to_noise
from lora_kit.diffusion.weights import masked_mean, min_snr_weight

__all__ = [
    "Draws",
    "add_noise",
    "alphas_cumprod",
    "draw_for_samples",
    "generator_for",
    "masked_mean",
    "min_snr_weight",
    "seed_for",
    "signal_to_noise",
    "stratified_timesteps",
    "target",
]
