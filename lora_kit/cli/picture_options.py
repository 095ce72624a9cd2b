"""What `generate` and `grid` take of pictures and samplers, checked before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lora_kit.errors import RecipeError

SAMPLER_HELP = "ddim, ddpm, dpm++, dpm++-sde, euler, euler-a, heun, pndm or unipc."
ETA_HELP = "Noise that ddim adds on the way: 0 is none, 1 is as much as ddpm's."
BATCH_HELP = "Pictures drawn at once. It changes them by rounding only. Default: as many as fit the memory at hand."
PROMPT_HELP = "What to draw. May be given several times. A super-resolution base takes none, but --image."
IMAGE_HELP = "Picture to begin at, or to enlarge; one for all prompts, or given once for each."
MASK_HELP = "What of the picture is drawn anew (white); the rest is kept. In the picture's size; as many as pictures."
STRENGTH_HELP = "How much of the picture is drawn anew, above 0 to 1. Default: 0.8, with a mask 1."
HELP_GROUPS = {
    "What is drawn": ("prompt", "negative", "seed", "seeds", "count", "size", "out", "overwrite"),
    "Adapters and learned tokens": ("adapter", "scales", "scale", "block_weights", "embedding"),
    "From a picture": ("image", "mask", "strength"),
    "Sampler": ("steps", "guidance", "sampler", "eta"),
    "Base and machine": ("prediction_type", "tokenizer", "long_prompts", "dtype", "batch_size"),
}
"""Headings of the help of `generate` and `grid`."""


class PictureOptions(NamedTuple):
    """`--image`, `--mask`, `--strength`."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    strength: float | None

    def facts(self) -> dict[str, str]:
        """For a picture's PNG: names without their folders."""
        told = {
            "images": ", ".join(path.name for path in self.images),
            "masks": ", ".join(path.name for path in self.masks),
            "strength": "" if self.strength is None else f"{self.strength:g}",
        }
        return {key: value for key, value in told.items() if value}


def prompts_or_pictures(prompt: Sequence[str] | None, image: Sequence[Path] | None) -> list[str]:
    """The prompts, or an empty one for each picture. Raises RecipeError where neither is given."""
    if not prompt and not image:
        raise RecipeError("say what to draw with --prompt; a base that enlarges pictures takes --image instead")
    return list(prompt or [""] * len(image or ()))


def picture_options(
    image: Sequence[Path] | None, mask: Sequence[Path] | None, strength: float | None, prompts: int
) -> PictureOptions:
    """The options, each picture in its prompt's place. Raises RecipeError for numbers that do not go together."""
    images, masks = tuple(image or ()), tuple(mask or ())
    if not images and (masks or strength is not None):
        option = "--mask" if masks else "--strength"
        raise RecipeError(f"{option} is about a picture to begin at: give one with --image, or leave it out")
    if len(images) not in (0, 1, prompts):
        raise RecipeError(f"got {len(images)} --image for {prompts} prompts; allowed: one for all, or one for each")
    if masks and len(masks) not in (1, len(images)):
        raise RecipeError(f"got {len(masks)} --mask for {len(images)} --image; allowed: one for all, or one for each")
    images *= prompts if len(images) == 1 else 1
    return PictureOptions(images, masks * len(images) if len(masks) == 1 else masks, strength)
