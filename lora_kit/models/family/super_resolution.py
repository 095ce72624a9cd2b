"""LDM super-resolution (Rombach et al. 2022, section 4.4): a network told a low-resolution picture, and no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from lora_kit.errors import ModelError, RecipeError
from lora_kit.models import first_stage
from lora_kit.models.bundle import Family, ModelBundle
from lora_kit.models.family.degrading import low_resolution
from lora_kit.models.family.picture_inputs import PictureInputs, image_pixels
from lora_kit.recipe.captions import LongText
from lora_kit.recipe.degradation import DegradationSection
from lora_kit.recipe.inpainting import check_inpainting
from lora_kit.recipe.without_text import check_super_resolution

if TYPE_CHECKING:
    from lora_kit.recipe import Recipe

PIPELINE_STEP = 32
"""LDMSuperResolutionPipeline takes low-resolution pictures whose sides are multiples of this, and resizes others."""


class SuperResolution:
    """The latents have the low-resolution picture's own height and width, and it lies behind them on the channel axis:
    the first stage shrinks by as much as the model enlarges. Latents are not scaled (`scaling_factor` is not read, as
    diffusers' pipeline does not)."""

    name = "ldm_super_resolution"
    needs_pixels = True
    begins_at_picture = False
    sees_mask = False
    fills_masks = False
    restores = True
    pipeline_name = "LDMSuperResolutionPipeline"

    def __init__(self, side_step: int, degradation: DegradationSection | None = None) -> None:
        """side_step: what a training picture's sides must be multiples of, pixels: the network halves its input as
        often as it has levels but one, and puts the halves together again only where they fit."""
        self.side_step = side_step
        self.degradation = degradation or DegradationSection()

    def for_recipe(self, recipe: Recipe) -> Family:
        """The family with the recipe's degradation. Raises RecipeError for all that is about text, and for sizes that
        the network does not take."""
        check_inpainting(recipe, self.name, fills=False)
        check_super_resolution(recipe, self.side_step)
        return SuperResolution(self.side_step, recipe.degradation)

    def encode(self, bundle: ModelBundle, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [b, 3, H, W] in -1..1 → the latents before quantisation [b, c, h, w] and a deviation of 0, fp32."""
        return first_stage.encode(bundle.vae, pixels)

    def target_latents(self, bundle: ModelBundle, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """z0 = mean, fp32: nothing is drawn, and nothing scaled."""
        return mean.float()

    def latent_scale(self, bundle: ModelBundle) -> tuple[float, float]:
        """Latents are the first stage's own."""
        return 1.0, 0.0

    def condition(self, bundle: ModelBundle, captions: list[str], long: LongText = "cut") -> None:
        """Nothing: there is no text."""

    def caption_states(self, bundle: ModelBundle, captions: list[str], long: LongText = "cut") -> list[Tensor]:
        """Raises ModelError: there is no text encoder."""
        raise ModelError(f"{bundle.source} reads no text: it has no text encoder.")

    def join_states(self, states: Sequence[Tensor]) -> None:
        """Nothing: there is no text."""

    def truncated(self, bundle: ModelBundle, captions: list[str]) -> int:
        """None is cut off, as none is read."""
        return 0

    def predict(
        self, bundle: ModelBundle, noisy: Tensor, timesteps: Tensor, condition: Any, beside: Tensor | None = None
    ) -> Tensor:
        """The UNet's output for z_t [b, c, h, w] with the low-resolution picture [b, 3, h, w] behind it, at t [b]
        (int64); fp32 in the latents' shape."""
        assert beside is not None, "super-resolution needs the low-resolution picture"
        dtype = bundle.unet.conv_in.weight.dtype
        return bundle.unet(torch.cat([noisy, beside], dim=1).to(dtype), timesteps).sample.float()

    def beside(
        self,
        bundle: ModelBundle,
        pixels: Tensor,
        holes: Sequence[Tensor | None],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """The pictures [b, 3, H, W] in -1..1, degraded to [b, 3, h, w] as the recipe's `degradation` says."""
        factor = first_stage.vae_factor(bundle)
        small = [
            low_resolution(one, factor, self.degradation, generator)
            for one, generator in zip(pixels.cpu(), generators, strict=True)
        ]
        return torch.stack(small).to(pixels.device)

    def beside_drawn(
        self,
        bundle: ModelBundle,
        inputs: Sequence[PictureInputs] | None,
        latents: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """The low-resolution pictures [b, 3, h, w] in -1..1. Raises RecipeError where there are none."""
        if inputs is None:
            raise RecipeError(f"{bundle.source} enlarges pictures: give it one (`--image FILE`).")
        for one in inputs:
            _refuse_mask(bundle, one)
        return image_pixels(inputs).to(bundle.device)

    def fitted_input(self, bundle: ModelBundle, given: PictureInputs) -> PictureInputs:
        """Resized to sides that are multiples of 32, by Pillow's Lanczos filter. Raises RecipeError for a picture that
        is smaller."""
        _refuse_mask(bundle, given)
        size = pipeline_picture_size(given.image.size, bundle.source)
        return replace(given, image=given.image.convert("RGB").resize(size, Image.Resampling.LANCZOS))

    def drawn_size(self, bundle: ModelBundle, picture: tuple[int, int]) -> tuple[int, int]:
        """The picture's sides times what the model enlarges by. Raises RecipeError for one that the network cannot
        take: its sides must be multiples of `side_step` over that."""
        factor = first_stage.vae_factor(bundle)
        step = self.side_step // factor
        if picture[0] % step or picture[1] % step or not all(picture):
            raise RecipeError(f"The picture has {picture[0]}x{picture[1]} pixels; this base takes multiples of {step}.")
        return picture[0] * factor, picture[1] * factor


def recognise_super_resolution(unet: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> Family:
    """The family of a UNet2DModel over a VQModel. Raises ModelError for channels that are not latents and a picture."""
    latents = vae.get("latent_channels", 3)
    wanted = latents + 3
    if unet.get("in_channels") != wanted or unet.get("out_channels") != latents:
        raise ModelError(
            f"{source}: its UNet takes {unet.get('in_channels')} channels and gives {unet.get('out_channels')}. "
            f"Super-resolution takes {wanted} (the first stage's {latents} and the low-resolution picture's 3) and "
            f"gives {latents}."
        )
    if unet.get("class_embed_type") is not None or unet.get("num_class_embeds") is not None:
        raise ModelError(f"{source} is a class-conditional model (its UNet has a class embedding), which is not known.")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return SuperResolution(factor * 2 ** (len(unet["block_out_channels"]) - 1))


def _refuse_mask(bundle: ModelBundle, given: PictureInputs) -> None:
    if given.mask is not None:
        raise RecipeError(f"{bundle.source} enlarges pictures and takes no mask: leave it out.")


def pipeline_picture_size(picture: tuple[int, int], source: str) -> tuple[int, int]:
    """Width and height that LDMSuperResolutionPipeline gives a low-resolution picture: sides cut to multiples of 32.

    Raises RecipeError for a picture that is smaller.
    """
    if min(picture) < PIPELINE_STEP:
        raise RecipeError(
            f"The picture has {picture[0]}x{picture[1]} pixels; {source} enlarges pictures of at least "
            f"{PIPELINE_STEP}x{PIPELINE_STEP}. Pad it, or enlarge it a little first."
        )
    width, height = (side - side % PIPELINE_STEP for side in picture)
    return width, height
