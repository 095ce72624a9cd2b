"""Prompts and seeds → pictures.

The loop is written out here rather than taken from a diffusers pipeline for three reasons: latents and guidance stay
in fp32 whatever precision the networks have, the VAE may have another precision than the UNet, and the networks may
be in the middle of training. In fp32 the pictures equal StableDiffusionPipeline's (a test holds that).
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lora_kit.errors import ModelError, RecipeError
from lora_kit.inference.starts import Inputs, check_inputs, default_strength, start, strength_problem
from lora_kit.models import ModelBundle, scheduler_named
from lora_kit.models.first_stage import decode as decode_latents
from lora_kit.models.first_stage import latent_channels, vae_factor
from lora_kit.progress import ProgressBar, no_progress
from lora_kit.recipe.captions import LongText

# Pixels of one batch: four pictures of 512 × 512, which with guidance run as eight. Fits 8 GB in fp16.
BATCH_PIXELS = 4 * 512 * 512
LARGEST_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How pictures are drawn; everything but prompt and seed."""

    steps: int = 25
    """Sampler steps."""
    guidance: float = 7.5
    """Classifier-free guidance scale (Ho & Salimans 2022); 1 or less turns it off and halves the work."""
    negative_prompt: str = ""
    width: int = 512
    """Pixels; a multiple of the VAE's factor, 8 for Stable Diffusion."""
    height: int = 512
    sampler: str = "ddim"
    """A name that `lora_kit.models.scheduler_named` knows."""
    eta: float = 0.0
    """Noise that DDIM adds on the way (Song et al. 2021, equation 16): 0 is deterministic, 1 is DDPM."""
    strength: float | None = None
    """How much of an input picture is drawn anew: the part of the steps that is gone through, above 0 to 1. None: 0.8,
    or 1 where there is a mask."""
    long_prompts: LongText = "cut"
    """What happens to prompts longer than the text encoder reads: as `data.captions.long` of a recipe."""


def draw(
    bundle: ModelBundle,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    settings: SamplingSettings,
    inputs: Inputs = None,
    batch_size: int | None = None,
    progress: ProgressBar = no_progress,
) -> list[Image.Image]:
    """One picture for each (prompt, seed) pair, in order. inputs: what each is drawn from; None: from noise alone.

    A picture's noise depends on its own seed alone, so how the pictures are batched changes them by rounding only.
    Adapters act as `set_scale` left them. The networks are put in eval mode, without gradients, and given their
    modes back; the global random state is not touched. `batch_size` None: as many as BATCH_PIXELS allows.

    Raises RecipeError for settings that cannot be drawn, ModelError if a picture is not finite.
    """
    if len(prompts) != len(seeds):
        raise RecipeError(f"got {len(prompts)} prompts and {len(seeds)} seeds; one seed belongs to each prompt")
    _check(bundle, settings, inputs)
    check_prompts(bundle, [*prompts, settings.negative_prompt])
    check_inputs(bundle, inputs, len(prompts), (settings.width, settings.height))
    size = batch_size or fitting_batch_size(settings)
    starts = range(0, len(prompts), size)
    pictures: list[Image.Image] = []
    with evaluating(*bundle.networks), torch.no_grad():
        for first in progress(starts, "drawing", len(starts)):
            part = slice(first, first + size)
            own = inputs[part] if inputs is not None else None
            latents = _denoise(bundle, prompts[part], seeds[part], settings, own)
            pictures += to_pictures(decode(bundle, latents))
    return pictures


def sample_latents(
    bundle: ModelBundle, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
) -> Tensor:
    """The latents [b, c, h, w] that `draw` decodes, fp32, as training sees them. Arguments as there."""
    _check(bundle, settings)
    size = fitting_batch_size(settings)
    starts = range(0, len(prompts), size)
    with evaluating(*bundle.components.values()), torch.no_grad():
        parts = [_denoise(bundle, prompts[at : at + size], seeds[at : at + size], settings) for at in starts]
    return torch.cat(parts)


def check_prompts(bundle: ModelBundle, prompts: Sequence[str]) -> None:
    """Raise RecipeError for a prompt to a base that reads no text."""
    asked = next((prompt for prompt in prompts if prompt), "")
    if asked and not bundle.has_text:
        raise RecipeError(
            f"{bundle.source} reads no text, and got the prompt {asked!r}; give it a picture alone (--image)"
        )


def fitting_batch_size(settings: SamplingSettings) -> int:
    """How many pictures of this size are drawn at once."""
    return max(1, min(LARGEST_BATCH, BATCH_PIXELS // (settings.width * settings.height)))


@contextmanager
def evaluating(*networks: nn.Module) -> Generator[None]:
    """Eval mode inside, every module's own mode restored after."""
    modes = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check(bundle: ModelBundle, settings: SamplingSettings, inputs: Inputs = None) -> None:
    factor = vae_factor(bundle)
    if settings.steps < 1:
        raise RecipeError(f"steps: got {settings.steps}, allowed: 1 and more")
    for side, pixels in (("width", settings.width), ("height", settings.height)):
        if pixels < factor or pixels % factor:
            near = max(factor, round(pixels / factor) * factor)
            raise RecipeError(f"{side}: got {pixels}, allowed: multiples of {factor} for this base; try {near}")
    if settings.eta and settings.sampler != "ddim":
        raise RecipeError(f"eta: got {settings.eta:g}, which is about the sampler 'ddim', not {settings.sampler!r}")
    if not 0 <= settings.eta <= 1:
        raise RecipeError(f"eta: got {settings.eta:g}, allowed: 0 to 1")
    if settings.strength is not None and inputs is None:
        raise RecipeError(f"strength: got {settings.strength:g}, which is about an input picture, and there is none")
    if settings.strength is not None and not bundle.family.begins_at_picture:
        raise RecipeError(
            f"strength: got {settings.strength:g}, but this base draws from noise beside the picture; leave it out"
        )
    if inputs is not None and (problem := strength_problem(settings.steps, _strength(bundle, settings, inputs))):
        raise RecipeError(f"strength: {problem}")


def _strength(bundle: ModelBundle, settings: SamplingSettings, inputs: Inputs) -> float:
    return default_strength(bundle, inputs) if settings.strength is None else settings.strength


def _denoise(
    bundle: ModelBundle,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    inputs: Inputs = None,
) -> Tensor:
    """Latents [b, c, h, w] at t = 0, fp32, still multiplied by the VAE's scaling factor."""
    config = {**bundle.scheduler_config, "prediction_type": bundle.prediction_type}
    scheduler: Any = scheduler_named(settings.sampler, config)
    scheduler.set_timesteps(settings.steps, device=bundle.device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = _step_options(scheduler, generators, settings)
    guided = settings.guidance > 1 and bundle.has_text
    captions = [settings.negative_prompt] * len(prompts) * guided + list(prompts)
    condition = bundle.family.condition(bundle, captions, settings.long_prompts)
    shape = _shape(bundle, len(prompts), settings)
    begun = start(bundle, scheduler, inputs, _strength(bundle, settings, inputs), shape, generators)
    latents, timesteps = begun.latents, begun.timesteps
    beside = None if begun.beside is None else torch.cat([begun.beside] * (1 + guided))
    for index, timestep in enumerate(timesteps):
        noisy = scheduler.scale_model_input(torch.cat([latents] * (1 + guided)), timestep)
        output = bundle.family.predict(bundle, noisy, timestep.expand(len(noisy)), condition, beside).float()
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + settings.guidance * (conditional - unconditional)
        latents = scheduler.step(output, timestep, latents, **options).prev_sample
        if begun.kept is not None:
            following = timesteps[index + 1] if index + 1 < len(timesteps) else None
            latents = begun.kept.put_back(scheduler, latents, following)
    return latents


def _step_options(scheduler: Any, generators: list[torch.Generator], settings: SamplingSettings) -> dict[str, Any]:
    """Samplers that add noise on the way take it from each picture's own generator."""
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in {"generator": generators, "eta": settings.eta}.items() if name in taken}


def _shape(bundle: ModelBundle, count: int, settings: SamplingSettings) -> tuple[int, int, int, int]:
    """Of the latents, [b, c, h, w]."""
    factor = vae_factor(bundle)
    return (count, latent_channels(bundle.vae), settings.height // factor, settings.width // factor)


def decode(bundle: ModelBundle, latents: Tensor) -> Tensor:
    """Latents [b, c, h, w] → pixels [b, 3, H, W] in 0..1, fp32.

    Raises ModelError if a value is not finite: fp16 VAEs overflow on some pictures.
    """
    vae: Any = bundle.vae
    # The VAE has its own precision and, being large, works on one picture at a time: activations are what fills memory.
    scale = bundle.family.latent_scale(bundle)
    pixels = torch.cat([decode_latents(vae, one, scale) for one in latents.split(_decoded_at_once(latents))])
    if not bool(torch.isfinite(pixels).all()):
        raise ModelError(
            f"the picture holds NaN or infinite values (networks in {bundle.unet.dtype}, VAE in {vae.dtype}). "
            "Use fp32 for the VAE; if it is fp32 already, the network's or adapter's weights are at fault."
        )
    return (pixels / 2 + 0.5).clamp(0, 1)


def _decoded_at_once(latents: Tensor) -> int:
    """Small latents go together; from 64 × 64 (512 pixels) one by one."""
    return max(1, 64 * 64 // (latents.shape[-1] * latents.shape[-2]))


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels [b, 3, H, W] in 0..1 → 8-bit RGB."""
    bytes_ = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in bytes_]
