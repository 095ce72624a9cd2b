"""Stable Diffusion v1 and v2: how a latent, a condition and a prediction are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_kit.errors import ModelError, RecipeError
from lora_kit.models import first_stage
from lora_kit.models.bundle import Family, ModelBundle
from lora_kit.models.family.family_names import fills_masks
from lora_kit.models.family.inpainting import FillsMasks
from lora_kit.models.family.picture_inputs import PictureInputs
from lora_kit.models.moving import moved
from lora_kit.models.text_states import PaddedStates, chunk_ids, expand_tokens, join_states
from lora_kit.recipe.captions import LongText
from lora_kit.recipe.inpainting import check_inpainting
from lora_kit.recipe.without_text import check_with_text

if TYPE_CHECKING:
    from lora_kit.recipe import Recipe

_OTHER_INPUTS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image-editing model (InstructPix2Pix)",
}


class StableDiffusion:
    """Latent diffusion on a VAE, told the last hidden state of a CLIP text encoder (Rombach et al. 2022)."""

    name = "sd"
    needs_pixels = False
    begins_at_picture = True
    sees_mask = False
    fills_masks = False
    restores = False
    pipeline_name = "StableDiffusionPipeline"

    def for_recipe(self, recipe: Recipe) -> Family:
        """Itself. Raises RecipeError for a section that is about other models."""
        check_inpainting(recipe, self.name, fills=False)
        check_with_text(recipe)
        return self

    def encode(self, bundle: ModelBundle, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [b, 3, H, W] in -1..1 → mean and standard deviation of the latents [b, c, h, w], unscaled fp32."""
        return first_stage.encode(bundle.vae, pixels)

    def target_latents(self, bundle: ModelBundle, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """z0 = scaling_factor · (mean + std · noise − shift), fp32; SD's own VAEs have no shift."""
        scale, shift = self.latent_scale(bundle)
        return (mean.float() + std.float() * noise.float() - shift) * scale

    def latent_scale(self, bundle: ModelBundle) -> tuple[float, float]:
        """`scaling_factor` and `shift_factor` of the VAE's config."""
        return first_stage.latent_scale(bundle.vae)

    def condition(self, bundle: ModelBundle, captions: list[str], long: LongText = "cut") -> Tensor | PaddedStates:
        """Captions → text states [b, tokens, width] in the text encoder's dtype; keeps the graph for training it.

        As StableDiffusionPipeline does: padded to the full length, no attention mask, last hidden state after
        the final norm. SD2's "penultimate layer" is in its config already, which has one layer less.
        With `long="chunks"` as `caption_states`; PaddedStates where the captions' numbers of chunks differ.
        """
        if long == "chunks":
            return self.join_states(self.caption_states(bundle, captions, long))
        return self._cut(bundle, captions)

    def caption_states(self, bundle: ModelBundle, captions: list[str], long: LongText = "cut") -> list[Tensor]:
        """Each caption's text states [tokens, width]. With `long="chunks"` a caption of n chunks has n times the
        tokens: each chunk is encoded by itself between a start and an end token, and the states follow one another."""
        if long == "cut":
            return list(self._cut(bundle, captions).unbind())
        chunks = chunk_ids(_tokenizer(bundle), captions, self.token_limit(bundle))
        device = next(bundle.text_encoder.parameters()).device
        ids = torch.tensor([ids for caption in chunks for ids in caption])
        states = self._states(bundle, moved(ids, device))
        return [part.flatten(0, 1) for part in states.split([len(caption) for caption in chunks])]

    def join_states(self, states: Sequence[Tensor]) -> Tensor | PaddedStates:
        """`caption_states` → the condition of a micro-batch."""
        return join_states(states)

    def _cut(self, bundle: ModelBundle, captions: list[str]) -> Tensor:
        tokenizer = _tokenizer(bundle)
        tokens: Any = tokenizer(
            expand_tokens(tokenizer, captions),
            padding="max_length",
            max_length=self.token_limit(bundle),
            truncation=True,
            return_tensors="pt",
        )
        device = next(bundle.text_encoder.parameters()).device
        return self._states(bundle, moved(tokens.input_ids, device))

    def _states(self, bundle: ModelBundle, ids: Tensor) -> Tensor:
        return bundle.text_encoder(ids).last_hidden_state

    def token_limit(self, bundle: ModelBundle) -> int:
        """Tokens in a caption, start and end included: 77 for CLIP."""
        return min(_tokenizer(bundle).model_max_length, bundle.text_encoder.config.max_position_embeddings)

    def truncated(self, bundle: ModelBundle, captions: list[str]) -> int:
        """How many captions are longer than the text encoder reads, so that `condition` cuts their end off."""
        limit = self.token_limit(bundle)
        encoded: Any = _tokenizer(bundle)(expand_tokens(_tokenizer(bundle), captions), truncation=False, verbose=False)
        return sum(len(ids) > limit for ids in encoded.input_ids)

    def predict(
        self,
        bundle: ModelBundle,
        noisy: Tensor,
        timesteps: Tensor,
        condition: Tensor | PaddedStates,
        beside: Tensor | None = None,
    ) -> Tensor:
        """The UNet's output for z_t [b, c, h, w] (`beside` behind it) at t [b] (int64), fp32 in the latents' shape.

        Inputs are cast to the dtype the base is held in, so that a bf16 base needs no autocast.
        """
        dtype = bundle.unet.conv_in.weight.dtype
        states, mask = condition if isinstance(condition, PaddedStates) else (condition, None)
        seen = noisy if beside is None else torch.cat([noisy, beside], dim=1)
        return bundle.unet(seen.to(dtype), timesteps, states.to(dtype), encoder_attention_mask=mask).sample.float()

    def beside(
        self,
        bundle: ModelBundle,
        pixels: Tensor,
        holes: Sequence[Tensor | None],
        generators: Sequence[torch.Generator],
    ) -> Tensor | None:
        """Nothing: the UNet takes z_t alone."""
        return None

    def beside_drawn(
        self,
        bundle: ModelBundle,
        inputs: Sequence[PictureInputs] | None,
        latents: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> Tensor | None:
        """Nothing: the UNet takes z_t alone."""
        return None

    def fitted_input(self, bundle: ModelBundle, given: PictureInputs) -> PictureInputs:
        """As it is."""
        return given

    def drawn_size(self, bundle: ModelBundle, picture: tuple[int, int]) -> tuple[int, int]:
        """The picture's own size, whose sides must be multiples of the VAE's factor."""
        factor = first_stage.vae_factor(bundle)
        fitting = [max(factor, round(side / factor) * factor) for side in picture]
        if list(picture) != fitting:
            raise RecipeError(
                f"The picture has {picture[0]}x{picture[1]} pixels; this base takes sides that are multiples of "
                f"{factor}. Resize or crop it, to {fitting[0]}x{fitting[1]} for example."
            )
        return picture


class StableDiffusion1(StableDiffusion):
    """SD 1.x: CLIP ViT-L/14, attention projections as 1×1 convolutions."""

    name = "sd1"


class StableDiffusion2(StableDiffusion):
    """SD 2.x: OpenCLIP ViT-H/14, attention projections as linear layers."""

    name = "sd2"


class StableDiffusion1Inpainting(FillsMasks, StableDiffusion):
    """SD 1.x inpainting."""

    name = "sd1-inpainting"


class StableDiffusion2Inpainting(FillsMasks, StableDiffusion):
    """SD 2.x inpainting."""

    name = "sd2-inpainting"


def recognise(unet: Mapping[str, Any], text_width: int, source: str) -> Family:
    """The family that a UNet's config and the text encoder's width describe.

    Raises ModelError, saying what was recognised, for models that lora_kit cannot train.
    """
    channels, width = unet.get("in_channels"), unet.get("cross_attention_dim")
    if unet.get("addition_embed_type") == "text_time":
        raise _unsupported(source, "a Stable Diffusion XL model (its UNet takes a pooled text embedding and sizes)")
    fills = fills_masks(unet)
    if channels != unet.get("out_channels") and not fills:
        kind = _OTHER_INPUTS.get(int(channels or 0), "of an unknown kind")
        raise _unsupported(source, f"{kind}: its UNet takes {channels} channels and gives {unet.get('out_channels')}")
    if unet.get("class_embed_type") is not None or unet.get("num_class_embeds") is not None:
        raise _unsupported(source, "a class-conditional model (its UNet has a class embedding)")
    if width != text_width:
        raise ModelError(
            f"{source}: the UNet attends to text states of width {width}, but the text encoder gives {text_width}. "
            f"Its parts come from different models; use the text encoder that the UNet was trained with."
        )
    first, second = (StableDiffusion1, StableDiffusion2)
    if fills:
        first, second = (StableDiffusion1Inpainting, StableDiffusion2Inpainting)
    return second() if unet.get("use_linear_projection") else first()


def _unsupported(source: str, what: str) -> ModelError:
    return ModelError(
        f"{source} is {what}. Supported so far: Stable Diffusion v1 and v2, text to image and inpainting."
    )


def _tokenizer(bundle: ModelBundle) -> Any:
    if bundle.tokenizer is None:
        raise ModelError(f"{bundle.source} was only laid out, without its tokenizer: load it with load_bundle.")
    return bundle.tokenizer
