"""How pictures are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from lora_kit.recipe.captions import LongText


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
    batch_size: int | None = None
    """Pictures drawn at once; it changes them by rounding only. None: as `inference.batching` says."""
