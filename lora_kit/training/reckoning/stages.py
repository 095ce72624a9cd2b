"""What the stages around a run's steps take, on fake tensors: encoding pictures, measuring, drawing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kit.inference.batching import LARGEST_BATCH, rows_of
from lora_kit.inference.sampling import decoded_at_once
from lora_kit.models import ModelBundle
from lora_kit.models.diffusers_layout import DiffusersBase
from lora_kit.models.first_stage import decode, latent_channels, vae_factor
from lora_kit.models.loading import open_layout
from lora_kit.recipe import Recipe
from lora_kit.training.caching import ENCODE_BATCH
from lora_kit.training.conditions import KEPT_TOKENS
from lora_kit.training.precision import DTYPES, base_dtype
from lora_kit.training.reckoning.live_bytes import LiveBytes, Scratch
from lora_kit.training.sizes import keeps_latents, picture_side
from lora_kit.training.validation.batches import measured_at_once, validation_settings


def autocast(recipe: Recipe, device: str) -> Any:
    """As a step's."""
    precision = DTYPES[recipe.train.mixed_precision]
    return torch.autocast(device, precision, enabled=precision != torch.float32)


def predict(bundle: ModelBundle, count: int, side: int, with_text: bool = False) -> Tensor:
    """The network's prediction for `count` pictures, side x side pixels. with_text: gradients flow into the text
    encoder."""
    cells, channels = side // vae_factor(bundle), latent_channels(bundle.vae)
    config: Any = bundle.unet.config
    more = int(config.in_channels) - channels
    beside = torch.empty(count, more, cells, cells) if more > 0 else None
    condition: Any = None
    if bundle.has_text:
        with torch.set_grad_enabled(with_text):
            condition = bundle.family.condition(bundle, [""] * count)
    noisy, times = torch.empty(count, channels, cells, cells), torch.zeros(count, dtype=torch.int64)
    return bundle.family.predict(bundle, noisy, times, condition, beside)


class Stages:
    """The fullest moment of each, in bytes of tensors beside the networks' weights."""

    def __init__(self, recipe: Recipe, bundle: ModelBundle, device: str, scratch: Scratch | None) -> None:
        """bundle: of fake tensors on `device`, which are the context's."""
        self._recipe, self._bundle, self._device = recipe, bundle, device
        weights = [value for net in bundle.networks for value in [*net.parameters(), *net.buffers()]]
        self._live = lambda: LiveBytes(weights, scratch)

    @torch.no_grad()
    def encoding(self) -> int:
        """A batch of pictures through the VAE, where latents are kept."""
        if not keeps_latents(self._recipe):
            return 0
        side = picture_side(self._recipe)
        with self._live() as live:
            self._bundle.family.encode(self._bundle, torch.empty(ENCODE_BATCH, 3, side, side))
        return live.peak

    @torch.no_grad()
    def measuring(self) -> int:
        """Held-out pictures through the network, as many as are measured at once; 0 without any."""
        if self._recipe.validation.held_out is None:
            return 0
        side = self._recipe.data.resolution
        cells = side // vae_factor(self._bundle)
        self._evaluate()
        with self._live() as live, autocast(self._recipe, self._device):
            predict(self._bundle, measured_at_once(cells, cells), side)
        return live.peak

    @torch.no_grad()
    def drawing(self) -> int:
        """Prompts as they are drawn, and their latents decoded; 0 where nothing is drawn."""
        count, side = self._drawn, self._recipe.data.resolution
        if not count:
            return 0
        cells, settings = side // vae_factor(self._bundle), validation_settings(self._recipe, self._bundle)
        count = min(settings.batch_size or 1, count)
        self._evaluate()
        with self._live() as live:
            predict(self._bundle, count * rows_of(self._bundle, settings), side)
        with self._live() as decoding:
            latents = torch.empty(count, latent_channels(self._bundle.vae), cells, cells)
            decode(self._bundle.vae, latents[: decoded_at_once(latents)])
        return max(live.peak, decoding.peak)

    def _evaluate(self) -> None:
        for network in self._bundle.networks:
            network.eval()

    @torch.no_grad()
    def kept(self, samples: int, trains_text: bool) -> int:
        """Latents and captions' states of so many pictures, one caption each, where memory keeps them."""
        bundle, recipe = self._bundle, self._recipe
        if recipe.data.cache == "disk":
            return 0
        found = 0
        if keeps_latents(recipe):
            cells = (picture_side(recipe) // vae_factor(bundle)) ** 2
            moments = 4 if recipe.data.flip else 2  # mean and deviation, fp32
            found += samples * moments * cells * latent_channels(bundle.vae) * 4
        if bundle.has_text and not trains_text:
            (states,) = bundle.family.caption_states(bundle, [""])
            found += min(samples, KEPT_TOKENS // len(states)) * states.numel() * states.element_size()
        return found

    def waiting(self) -> int:
        """Of the frozen weights, those that lie in their file alone while pictures are encoded (`mapped.forget`): the
        UNet's, where its folder holds them in the run's precision."""
        with open_layout(self._recipe.model) as layout:
            stored = layout.stored_dtype("unet") if isinstance(layout, DiffusersBase) else None
        fresh = self._recipe.model.weights == "fresh"
        if fresh or stored != base_dtype(self._recipe):
            return 0
        frozen = [weight for weight in self._bundle.unet.parameters() if not weight.requires_grad]
        return sum(weight.numel() * weight.element_size() for weight in frozen)

    def rested(self, trains_text: bool) -> int:
        """Of the encoders' weights, those that steps need nothing of, as `rest_encoders` finds. That pictures have no
        more captions than are kept is taken for granted."""
        bundle, recipe = self._bundle, self._recipe
        names = ["vae"] if keeps_latents(recipe) and not bundle.family.sees_mask else []
        if bundle.has_text and recipe.data.cache == "disk" and not trains_text:
            names.append("text_encoder")
        weights = [weight for name in names for weight in getattr(bundle, name).parameters()]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    @property
    def _drawn(self) -> int:
        """Pictures that a validation draws, or one that the result does, as far as they are many."""
        section, family = self._recipe.validation, self._bundle.family
        if section.retrieval:
            return LARGEST_BATCH
        restored = section.restored if family.restores and section.held_out is not None else 0
        filled = 1 if family.sees_mask and section.held_out is not None else 0
        return max(len(section.prompts), restored, filled)
