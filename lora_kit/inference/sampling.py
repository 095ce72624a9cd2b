"""Prompts and seeds → pictures.

The loop is written out here rather than taken from a diffusers pipeline for three reasons: latents and guidance stay
in fp32 whatever precision the networks have, the VAE may have another precision than the UNet, and the networks may
be in the middle of training. In fp32 the pictures equal StableDiffusionPipeline's (a test holds that).
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lora_kit.errors import ModelError, RecipeError
from lora_kit.inference.batching import Job, distinct_jobs, start_key, usual_batch_size
from lora_kit.inference.captions import CaptionStates
from lora_kit.inference.guidance import Guidance
from lora_kit.inference.settings import SamplingSettings
from lora_kit.inference.starts import Inputs, check_inputs, default_strength, start, strength_problem
from lora_kit.models import ModelBundle, scheduler_named
from lora_kit.models.first_stage import decode as decode_latents
from lora_kit.models.first_stage import latent_channels, vae_factor
from lora_kit.progress import ProgressBar, no_progress


def draw(
    bundle: ModelBundle,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    settings: SamplingSettings,
    inputs: Inputs = None,
    captions: CaptionStates | None = None,
    progress: ProgressBar = no_progress,
) -> list[Image.Image]:
    """One picture for each (prompt, seed) pair, in order. inputs: what each is drawn from; None: from noise alone.

    A picture's noise depends on its own seed alone, so how the pictures are batched changes them by rounding only. Of
    pairs that are equal one is drawn, and each caption is encoded once. Adapters act as `set_scale` left them. The
    networks are put in eval mode, without gradients, and given their modes back; the global random state is not
    touched. captions: states of the same text encoder as it is now, from another call, to be used and added to.

    Raises RecipeError for settings that cannot be drawn, ModelError if a picture is not finite.
    """
    if len(prompts) != len(seeds):
        raise RecipeError(f"got {len(prompts)} prompts and {len(seeds)} seeds; one seed belongs to each prompt")
    _check(bundle, settings, inputs)
    check_prompts(bundle, [*prompts, settings.negative_prompt])
    check_inputs(bundle, inputs, len(prompts), (settings.width, settings.height))
    captions = captions or CaptionStates(bundle, settings.long_prompts)
    jobs, of_request = distinct_jobs(prompts, seeds, inputs)
    size = usual_batch_size(settings)
    starts = range(0, len(jobs), size)
    pictures: list[Image.Image] = []
    with evaluating(*bundle.networks), torch.no_grad():
        for first in progress(starts, "drawing", len(starts)):
            latents = _denoise(bundle, jobs[first : first + size], settings, captions, inputs)
            pictures += to_pictures(decode(bundle, latents))
    return [pictures[place] for place in of_request]


def sample_latents(
    bundle: ModelBundle, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
) -> Tensor:
    """The latents [b, c, h, w] that `draw` decodes, fp32, as training sees them. Arguments as there."""
    _check(bundle, settings)
    captions = CaptionStates(bundle, settings.long_prompts)
    jobs, of_request = distinct_jobs(prompts, seeds, None)
    size = usual_batch_size(settings)
    with evaluating(*bundle.components.values()), torch.no_grad():
        parts = [_denoise(bundle, jobs[at : at + size], settings, captions) for at in range(0, len(jobs), size)]
    return torch.cat(parts)[of_request]


def check_prompts(bundle: ModelBundle, prompts: Sequence[str]) -> None:
    """Raise RecipeError for a prompt to a base that reads no text."""
    asked = next((prompt for prompt in prompts if prompt), "")
    if asked and not bundle.has_text:
        raise RecipeError(
            f"{bundle.source} reads no text, and got the prompt {asked!r}; give it a picture alone (--image)"
        )


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
    if settings.batch_size is not None and settings.batch_size < 1:
        raise RecipeError(f"batch_size: got {settings.batch_size}, allowed: 1 and more")
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
    jobs: Sequence[Job],
    settings: SamplingSettings,
    captions: CaptionStates,
    inputs: Inputs = None,
) -> Tensor:
    """Latents [b, c, h, w] at t = 0, fp32, still multiplied by the VAE's scaling factor. inputs: of all requests."""
    config = {**bundle.scheduler_config, "prediction_type": bundle.prediction_type}
    scheduler: Any = scheduler_named(settings.sampler, config)
    scheduler.set_timesteps(settings.steps, device=bundle.device)
    generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
    options = _step_options(scheduler, generators, settings)
    own = None if inputs is None else [inputs[job.place] for job in jobs]
    begun = start(
        bundle, scheduler, own, _strength(bundle, settings, inputs), _shape(bundle, len(jobs), settings), generators
    )
    latents, timesteps = begun.latents, begun.timesteps
    guidance = Guidance(bundle, captions, settings, [job.prompt for job in jobs], begun.beside)
    same_start = [(job.seed, start_key(inputs, job.place)) for job in jobs]
    for index, timestep in enumerate(timesteps):
        noisy = scheduler.scale_model_input(latents, timestep)
        output = guidance.predict(noisy, timestep, same_start if index == 0 else None)
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
    pixels = torch.cat([decode_latents(vae, one, scale) for one in latents.split(decoded_at_once(latents))])
    if not bool(torch.isfinite(pixels).all()):
        raise ModelError(
            f"the picture holds NaN or infinite values (networks in {bundle.unet.dtype}, VAE in {vae.dtype}). "
            "Use fp32 for the VAE; if it is fp32 already, the network's or adapter's weights are at fault."
        )
    return (pixels / 2 + 0.5).clamp(0, 1)


def decoded_at_once(latents: Tensor) -> int:
    """Small latents go together; from 64 × 64 (512 pixels) one by one."""
    return max(1, 64 * 64 // (latents.shape[-1] * latents.shape[-2]))


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels [b, 3, H, W] in 0..1 → 8-bit RGB."""
    bytes_ = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in bytes_]
