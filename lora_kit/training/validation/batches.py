"""How many pictures validation measures and draws at once: it should not take more memory than the steps do."""

from __future__ import annotations

from dataclasses import replace

from lora_kit.inference import SamplingSettings
from lora_kit.inference.batching import picture_bytes, rows_of, usual_batch_size
from lora_kit.models import ModelBundle
from lora_kit.recipe import Recipe
from lora_kit.training.sizes import micro_batch

MOST_MEASURED = 16
MEASURED_CELLS = 64 * 64
"""Latent cells that are measured at once: one picture of 512 x 512 of Stable Diffusion."""
SMALL = 2**26
"""Bytes that drawing may take whatever a step does: without that, tiny networks would draw pictures one by one."""


def measured_at_once(height: int, width: int) -> int:
    """Pictures whose losses are measured together, of latents of this size. By that alone, not by the machine or the
    batch, as it changes the losses by rounding."""
    return max(1, min(MOST_MEASURED, MEASURED_CELLS // (height * width)))


def validation_settings(recipe: Recipe, bundle: ModelBundle, size: tuple[int, int] | None = None) -> SamplingSettings:
    """The validation section's sampler settings at the training resolution, or another size (width, height).

    Twice as many rows are drawn at once as a step has in its micro-batch: a pass without gradients keeps next to
    nothing of what a step keeps.
    """
    section, side = recipe.validation, recipe.data.resolution
    width, height = size or (side, side)
    settings = SamplingSettings(
        steps=section.steps,
        guidance=section.guidance,
        negative_prompt=section.negative_prompt,
        width=width,
        height=height,
        long_prompts=recipe.data.captions.long,
    )
    as_a_step = 2 * micro_batch(recipe) // rows_of(bundle, settings)
    small = SMALL // picture_bytes(bundle, settings)
    at_once = max(1, min(usual_batch_size(settings), max(as_a_step, small)))
    return replace(settings, batch_size=at_once)
