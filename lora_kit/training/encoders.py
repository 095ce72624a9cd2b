"""The networks that turn pictures and captions into what is cached, each moved to the device when first called."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_kit.data.cache import Encode, TextEncode
from lora_kit.models import ModelBundle, skeleton
from lora_kit.models.attention import use_attention
from lora_kit.models.loading import fresh_text_encoder, open_layout
from lora_kit.models.tokenizers import check
from lora_kit.recipe import Recipe
from lora_kit.recipe.captions import LongText
from lora_kit.targeting import make_plan, module_tree
from lora_kit.training.precision import base_dtype


def load_encoders(recipe: Recipe) -> ModelBundle:
    """The recipe's base with its UNet only laid out: what fills a cache needs no more."""
    bundle = skeleton(recipe.model)
    dtype = base_dtype(recipe)
    with open_layout(recipe.model) as layout:
        configs = layout.configs()
        fresh = recipe.model.weights == "fresh"
        bundle.vae = layout.vae(torch.float32)
        if configs.text_encoder is not None:
            bundle.text_encoder = (
                fresh_text_encoder(configs, dtype, recipe.seed) if fresh else layout.text_encoder(dtype)
            )
            bundle.tokenizer = layout.tokenizer()
            check(bundle.tokenizer, configs.text_encoder.vocab_size, recipe.model.base)
    for network in bundle.networks[1:]:  # all but the UNet
        network.eval().requires_grad_(False)
    use_attention(recipe.model.attention, bundle.vae)
    return bundle


def trains_text_encoder(recipe: Recipe, bundle: ModelBundle) -> bool:
    """Whether the recipe's rules pick anything of the text encoder, or there are tokens to learn in it."""
    if recipe.tokens:
        return True
    plan = make_plan(recipe.targets, module_tree(bundle.components))
    return any(target.module.component == "text_encoder" for target in plan.targets)


def latent_encoder(bundle: ModelBundle, device: torch.device) -> Encode:
    """Pixels [b, 3, H, W] → (mean, std). The VAE stays where it is until the first call."""

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        nn.Module.to(bundle.vae, device)
        return bundle.family.encode(bundle, pixels.to(device))

    return encode


def text_encoder(bundle: ModelBundle, accelerator: Accelerator, long: LongText) -> TextEncode:
    """Captions → each one's states [tokens, width], as a training step makes them; moved as `latent_encoder`."""

    def encode(captions: list[str]) -> list[Tensor]:
        nn.Module.to(bundle.text_encoder, accelerator.device)
        with accelerator.autocast():
            return bundle.family.caption_states(bundle, captions, long)

    return encode
