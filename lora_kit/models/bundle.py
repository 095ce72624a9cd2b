"""A base model: its networks, tokenizer, schedule and family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPTokenizer

from lora_kit.models.family.picture_inputs import PictureInputs
from lora_kit.models.unets import UNet
from lora_kit.recipe.captions import LongText

if TYPE_CHECKING:
    from lora_kit.models.recall import Recall
    from lora_kit.recipe import Recipe

FirstStage = AutoencoderKL | VQModel
Tokenizer = CLIPTokenizer | BertTokenizer


class Family(Protocol):
    """What differs between model families. The loop, the objective and the file code know none by name."""

    name: str
    """`sd1`, `sd2`, …"""
    needs_pixels: bool
    """Whether `beside` is made of the pictures themselves: each step then reads them, even where latents are kept."""
    begins_at_picture: bool
    """Whether sampling can begin at a picture's own latents, noised (img2img: Meng et al. 2022, "SDEdit")."""
    sees_mask: bool
    """Whether the network is told by `beside_drawn` what is to be filled. For others, what surrounds the mask is put
    back after each step of the sampler."""
    restores: bool
    """Whether what is drawn is to be the picture that `beside` was made of: PSNR and SSIM tell how near it comes."""
    pipeline_name: str
    """The class of diffusers that draws with it."""
    fills_masks: bool
    """Whether the data's masks say what is to be filled, which `beside` is told, not what counts in the loss."""

    def for_recipe(self, recipe: Recipe) -> Family:
        """The family as the recipe's section about it says. Raises RecipeError for what it cannot do."""
        ...

    def encode(self, bundle: ModelBundle, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [b, 3, H, W] in -1..1 → mean and standard deviation of the latents [b, c, h, w], unscaled fp32."""
        ...

    def target_latents(self, bundle: ModelBundle, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """The clean latents z0 = scale · (mean + std · noise) that the diffusion is trained on, fp32."""
        ...

    def latent_scale(self, bundle: ModelBundle) -> tuple[float, float]:
        """(scale, shift): `target_latents` is scale · (latents - shift), and decoding undoes it."""
        ...

    def condition(self, bundle: ModelBundle, captions: list[str], long: LongText = "cut") -> Any:
        """What the network is told besides z_t and t: for SD the text states [b, tokens, width].

        long: captions longer than the text encoder reads are cut off, or encoded in chunks.
        """
        ...

    def caption_states(self, bundle: ModelBundle, captions: list[str], long: LongText = "cut") -> list[Tensor]:
        """Each caption's part of the condition, to be kept and joined again: for SD its text states [tokens, width]."""
        ...

    def join_states(self, states: Sequence[Tensor]) -> Any:
        """`caption_states` of a micro-batch, on one device → its condition: `condition` is one after the other."""
        ...

    def truncated(self, bundle: ModelBundle, captions: list[str]) -> int:
        """How many captions are longer than a condition without chunks can hold, so that their end is cut off."""
        ...

    def predict(
        self, bundle: ModelBundle, noisy: Tensor, timesteps: Tensor, condition: Any, beside: Tensor | None = None
    ) -> Tensor:
        """The network's output for z_t [b, c, h, w] and t [b] (int64), in the latents' shape.

        beside: [b, k, h, w], behind z_t on the channel axis; None for a network that takes z_t alone (k = 0).
        """
        ...

    def beside(
        self,
        bundle: ModelBundle,
        pixels: Tensor,
        holes: Sequence[Tensor | None],
        generators: Sequence[torch.Generator],
    ) -> Tensor | None:
        """What training puts beside z_t, fp32 [b, k, h, w], on the base's device or the pictures'; only asked where
        `needs_pixels`.

        pixels: [b, 3, H, W] in -1..1, on the CPU or the base's device. holes: of each picture, what the data says is to
        be filled, [1, H, W] in 0..1, or None. Everything random of a sample comes from its own CPU generator, so that
        it does not depend on batching.
        """
        ...

    def beside_drawn(
        self,
        bundle: ModelBundle,
        inputs: Sequence[PictureInputs] | None,
        latents: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> Tensor | None:
        """What sampling puts beside z_t, fp32 [b, k, h, w] on the base's device; None where the network takes nothing.

        inputs: of each picture to be drawn; None: drawn from the prompt alone. latents: their shape [b, c, h, w].
        Raises RecipeError where the network needs an input that is not given.
        """
        ...

    def fitted_input(self, bundle: ModelBundle, given: PictureInputs) -> PictureInputs:
        """An input picture as the family's own pipeline of diffusers resizes it, where that does.

        Raises RecipeError for one that it cannot take.
        """
        ...

    def drawn_size(self, bundle: ModelBundle, picture: tuple[int, int]) -> tuple[int, int]:
        """Width and height of what is drawn from an input picture of this width and height, pixels.

        Raises RecipeError for a picture that does not fit, saying which sizes do.
        """
        ...


@dataclass
class ModelBundle:
    """A loaded (or, on the meta device, only laid out) base model."""

    family: Family
    unet: UNet
    vae: FirstStage
    text_encoder: Any
    """None for a model that reads no text; so is `tokenizer`."""
    tokenizer: Any
    scheduler_config: dict[str, Any]
    """The base's scheduler/scheduler_config.json: betas, prediction_type, …"""
    prediction_type: str
    """`epsilon`, `v_prediction` or `sample`, after any override."""
    source: str
    """The base as the user named it."""
    recall: Recall | None = None
    """Reads `vae` and `text_encoder` again, so that their weights can be given back meanwhile; None: they stay."""

    @property
    def components(self) -> dict[str, nn.Module]:
        """The networks that rules can pick from, by the name a rule starts with."""
        found: dict[str, nn.Module] = {"unet": self.unet}
        return found | ({"text_encoder": self.text_encoder} if self.has_text else {})

    @property
    def has_text(self) -> bool:
        """Whether the model reads captions."""
        return self.text_encoder is not None

    @property
    def networks(self) -> list[nn.Module]:
        """Everything that holds weights."""
        return [*self.components.values(), self.vae]

    @property
    def device(self) -> torch.device:
        """Where the UNet lies; the other networks follow it."""
        # Not diffusers' `unet.device`: that asks all modules for an offloading hook, 6 ms a call, several times a step.
        return next(self.unet.parameters()).device
