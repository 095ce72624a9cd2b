"""What an inpainting UNet is given beside z_t: the mask at latent size, and the latents of the masked picture.

Rombach et al. 2022, section 4.5; channels in the order of Stable Diffusion's inpainting models: z_t, mask, picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lora_kit.models.bundle import Family, ModelBundle
from lora_kit.models.family.masks import mask_for
from lora_kit.models.family.picture_inputs import PictureInputs, image_pixels, mask_pixels, picture_inputs
from lora_kit.models.first_stage import vae_factor
from lora_kit.models.moving import moved
from lora_kit.models.released import bring
from lora_kit.recipe.inpainting import InpaintingSection, check_inpainting
from lora_kit.recipe.without_text import check_with_text

if TYPE_CHECKING:
    from lora_kit.recipe import Recipe


class FillsMasks:
    """What is different in a family whose UNet is given the mask and the masked picture; before the plain family."""

    name = "inpainting"
    needs_pixels = True
    sees_mask = True
    pipeline_name = "StableDiffusionInpaintPipeline"

    def __init__(self, section: InpaintingSection | None = None) -> None:
        """section: the recipe's, which training makes masks by."""
        self.section = section or InpaintingSection()
        self.fills_masks = self.section.masks == "data"
        """Whether the data's masks are what is to be filled."""

    def for_recipe(self, recipe: Recipe) -> Family:
        """The family with the recipe's section `inpainting`."""
        check_inpainting(recipe, self.name, fills=True)
        check_with_text(recipe)
        return cast(Family, type(self)(recipe.inpainting))

    @torch.no_grad()
    def beside(
        self,
        bundle: ModelBundle,
        pixels: Tensor,
        holes: Sequence[Tensor | None],
        generators: Sequence[torch.Generator],
    ) -> Tensor | None:
        """Mask and masked picture [b, 1 + c, h, w], the masks as the section says."""
        size = (pixels.shape[-2], pixels.shape[-1])
        masks = [mask_for(self.section, hole, size, chance) for hole, chance in zip(holes, generators, strict=True)]
        device = bundle.device
        return mask_and_picture(bundle, moved(pixels, device), moved(torch.stack(masks), device), generators)

    @torch.no_grad()
    def beside_drawn(
        self,
        bundle: ModelBundle,
        inputs: Sequence[PictureInputs] | None,
        latents: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> Tensor | None:
        """Mask and masked picture [b, 1 + c, h, w]; without inputs, or without a mask, everything is to be filled."""
        if inputs is None:
            factor = vae_factor(bundle)
            size = (latents[-2] * factor, latents[-1] * factor)
            pixels, masks = torch.zeros(len(generators), 3, *size), torch.ones(len(generators), 1, *size)
        else:
            pixels, masks = image_pixels(inputs), mask_pixels(inputs)
        return mask_and_picture(bundle, pixels.to(bundle.device), masks.to(bundle.device), generators)

    def part_of(self, pixels: Tensor, hole: Tensor | None, chance: torch.Generator) -> PictureInputs:
        """A picture [3, H, W] in -1..1 and a part to be filled, to look at: as in training, but never all of it."""
        partly = self.section.model_copy(update={"whole": 0.0})
        mask = mask_for(partly, hole, (pixels.shape[-2], pixels.shape[-1]), chance)
        return picture_inputs(pixels, mask)


def mask_and_picture(
    bundle: ModelBundle, pixels: Tensor, masks: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """Masks [b, 1, H, W] of 0 and 1, at latent size by the nearest pixel, before the latents of pixels · (1 - mask), a
    sample of the VAE's posterior by each picture's generator: fp32 [b, 1 + c, h, w]. As StableDiffusionInpaintPipeline.
    """
    bring(bundle, "vae", pixels.device)  # it may have waited on the CPU
    mean, std = bundle.family.encode(bundle, pixels * (masks < 0.5))
    noise = torch.stack([torch.randn(mean.shape[1:], generator=chance) for chance in generators])
    latents = bundle.family.target_latents(bundle, mean, std, moved(noise, mean.device))
    cells = nn.functional.interpolate(masks, size=(latents.shape[-2], latents.shape[-1]))
    return torch.cat([cells, latents], dim=1)
