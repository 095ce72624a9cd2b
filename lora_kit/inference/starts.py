"""Where sampling begins: at noise, or at a picture's latents, noised; and what is kept of the picture on the way.

As StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline do it, with their order of random draws: a seed
gives the same picture (tests hold that).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kit.errors import RecipeError
from lora_kit.models import ModelBundle
from lora_kit.models.family.picture_inputs import PictureInputs, image_pixels, mask_pixels
from lora_kit.models.released import bring

PICTURE_STRENGTH = 0.8
MASK_STRENGTH = 1.0
"""diffusers' defaults."""
Inputs = Sequence[PictureInputs] | None


class Kept(NamedTuple):
    """What is put back around the mask after each step, for a network that does not see the mask itself."""

    clean: Tensor
    """Latents of the pictures [b, c, h, w]."""
    noise: Tensor
    """What they are noised with, always the same."""
    mask: Tensor
    """[b, 1, h, w]: 1 is drawn anew, 0 is kept."""

    def put_back(self, scheduler: Any, latents: Tensor, following: Tensor | None) -> Tensor:
        """The latents after a step, with those of the pictures around the mask, noised for the next timestep (None:
        clean)."""
        known = self.clean
        if following is not None:
            known = scheduler.add_noise(known, self.noise, following[None])
        return (1 - self.mask) * known + self.mask * latents


class Start(NamedTuple):
    """Everything that a sampling loop begins with."""

    latents: Tensor
    """[b, c, h, w] at the first timestep, fp32."""
    timesteps: Tensor
    """Those that are gone through."""
    beside: Tensor | None
    """What the network is given beside the latents; None: nothing."""
    kept: Kept | None


def start(
    bundle: ModelBundle,
    scheduler: Any,
    inputs: Inputs,
    strength: float,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
) -> Start:
    """The start of b pictures whose latents have `shape` [b, c, h, w]; `scheduler` has its timesteps.

    strength: the part of the timesteps that is gone through, from the noisy end; 1: all.
    """
    timesteps = scheduler.timesteps
    masked = inputs is not None and inputs[0].mask is not None
    sees_mask = masked and bundle.family.sees_mask
    begins = inputs is not None and bundle.family.begins_at_picture
    clean = None
    if inputs is not None and begins and (strength < 1 or not sees_mask):
        timesteps = _last_part(scheduler, strength)
        clean = picture_latents(bundle, image_pixels(inputs), generators)
    noise = _noise(generators, shape[1:]).to(bundle.device)
    pure = clean is None or (masked and strength == 1)
    latents = noise * scheduler.init_noise_sigma
    if clean is not None and not pure:
        latents = scheduler.add_noise(clean, noise, timesteps[:1].repeat(shape[0]))
    beside = bundle.family.beside_drawn(bundle, inputs, shape, generators)
    kept = None
    if inputs is not None and masked and not sees_mask and clean is not None:
        kept = Kept(clean, noise, latent_mask(mask_pixels(inputs), shape).to(bundle.device))
        # diffusers encodes the masked picture here too, and uses nothing of it but this draw.
        _noise(generators, shape[1:])
    return Start(latents, timesteps, beside, kept)


def strength_problem(steps: int, strength: float) -> str | None:
    """What is wrong with going through this part of so many steps; None: nothing."""
    if not 0 <= strength <= 1:
        return f"got {strength:g}, allowed: above 0 and at most 1"
    if int(steps * strength) < 1:
        return f"got {strength:g}, which is less than one of {steps} steps; allowed: {1 / steps:g} to 1, or more steps"
    return None


def default_strength(bundle: ModelBundle, inputs: Inputs) -> float:
    """Of a picture without a strength asked for; 1 where sampling does not begin at it."""
    plain = inputs is not None and inputs[0].mask is None
    return PICTURE_STRENGTH if plain and bundle.family.begins_at_picture else MASK_STRENGTH


def picture_latents(bundle: ModelBundle, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """z_0 [b, c, h, w] of pictures [b, 3, H, W], a sample of the VAE's posterior by each one's generator; fp32."""
    bring(bundle, "vae", bundle.device)
    mean, std = bundle.family.encode(bundle, pixels.to(bundle.device))
    return bundle.family.target_latents(bundle, mean, std, _noise(generators, mean.shape[1:]).to(bundle.device))


def latent_mask(masks: Tensor, shape: Sequence[int]) -> Tensor:
    """Masks [b, 1, H, W] at the latents' size, the nearest pixel of each cell."""
    return nn.functional.interpolate(masks, size=(shape[-2], shape[-1]))


def check_inputs(bundle: ModelBundle, inputs: Inputs, count: int, size: tuple[int, int]) -> None:
    """Raise RecipeError for pictures and masks that cannot be drawn from at `size` (width, height)."""
    if inputs is None:
        return
    if len(inputs) != count:
        raise RecipeError(f"got {count} prompts and {len(inputs)} input pictures; one belongs to each prompt")
    if len({one.mask is None for one in inputs}) > 1:
        raise RecipeError("some of the input pictures have a mask and some have none; draw them one after the other")
    for one in inputs:
        if one.mask is not None and one.mask.size != one.image.size:
            raise RecipeError(
                f"the mask has {_sides(one.mask.size)} pixels and the picture {_sides(one.image.size)}; "
                "make the mask in the picture's size"
            )
        fitting = bundle.family.drawn_size(bundle, one.image.size)
        if fitting != size:
            raise RecipeError(
                f"the input picture of {_sides(one.image.size)} pixels gives {_sides(fitting)}, and {_sides(size)} "
                "are asked for; leave the size out, or resize the picture"
            )


def _last_part(scheduler: Any, strength: float) -> Tensor:
    """The timesteps of the last `strength` of the steps. Some schedulers count them themselves, and are told."""
    steps: int = scheduler.num_inference_steps
    first = max(steps - min(int(steps * strength), steps), 0) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:]


def _noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal [b, *shape], fp32, on the CPU, so that a seed means the same on every device."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
