"""The run's pictures and captions, encoded as far as the recipe keeps them, and where the networks lie after that."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from lora_kit.data import TrainingSet, cache_latents
from lora_kit.data.cache import DiskTexts
from lora_kit.models import ModelBundle
from lora_kit.models.first_stage import vae_factor
from lora_kit.progress import ProgressBar
from lora_kit.recipe import Recipe
from lora_kit.training.caching import ENCODE_BATCH, data_sets, fill_cache, open_cache
from lora_kit.training.encoders import latent_encoder


class PreparedData(NamedTuple):
    """Everything a run reads."""

    training: TrainingSet
    held_out: TrainingSet | None
    texts: tuple[DiskTexts, ...]
    """Captions' states on disk."""
    notices: tuple[str, ...]
    """What the user should be told once about the cache."""

    @property
    def needs_vae(self) -> bool:
        """Whether steps encode pictures."""
        return self.training.latents is None


def prepare_data(
    recipe: Recipe, bundle: ModelBundle, trains_text: bool, accelerator: Accelerator, bar: ProgressBar
) -> PreparedData:
    """Open the data sets, and encode what is to be kept. `bundle` carries no adapters yet, and lies on the CPU.

    Raises DataError for what cannot be used, as `data.on_error` says; both sets are opened before one is encoded.
    """
    factor = vae_factor(bundle)
    if recipe.data.cache == "disk":
        cache = open_cache(recipe, bundle, trains_text)
        sets = _told(data_sets(recipe, cache.hints, bar, factor, bundle.has_text), bundle)
        filled = [fill_cache(cache, data, bundle, accelerator, bar) for data in sets]
        texts, notices = tuple(one.texts for one in filled if one.texts is not None), tuple(cache.store.notices)
    else:
        sets, texts, notices = _told(data_sets(recipe, None, bar, factor, bundle.has_text), bundle), (), ()
        for data in sets:
            cache_latents(data, latent_encoder(bundle, accelerator.device), ENCODE_BATCH, bar)
    for data in sets:
        _tell_cut_captions(data, bundle)
    return PreparedData(sets[0], sets[1] if len(sets) > 1 else None, texts, notices)


def place_networks(
    bundle: ModelBundle, data: PreparedData, trains_text: bool, device: torch.device, sharded: bool = False
) -> None:
    """Put on the device what steps need: the UNet, and the others only where not everything is kept of what they make.

    Those that were there to fill a cache go back to the CPU. sharded: what is trained follows later, in parts.
    """
    cpu = torch.device("cpu")
    home = cpu if sharded else device
    _move(bundle.unet, home)
    _move(bundle.vae, device if data.needs_vae else cpu)
    if bundle.has_text:
        _move(bundle.text_encoder, home if trains_text else cpu if data.texts else device)


@contextmanager
def visiting(device: torch.device, *networks: nn.Module) -> Generator[None]:
    """Networks on the device while inside, and back where they were afterwards."""
    homes = [next(network.parameters()).device for network in networks]
    for network in networks:
        _move(network, device)
    try:
        yield
    finally:
        for network, home in zip(networks, homes, strict=True):
            _move(network, home)


def _move(network: nn.Module, device: torch.device) -> None:
    if next(network.parameters()).device != device:
        network.to(device)


def _told(sets: list[TrainingSet], bundle: ModelBundle) -> list[TrainingSet]:
    """The sets, told what the base's family needs of pictures and masks."""
    for data in sets:
        data.keeps_pixels = bundle.family.needs_pixels
        data.fills_masks = bundle.family.fills_masks
    return sets


def _tell_cut_captions(data: TrainingSet, bundle: ModelBundle) -> None:
    captions = data.longest_captions() if data.section.captions.long == "cut" else []
    cut = bundle.family.truncated(bundle, captions) if captions else 0
    if cut:
        data.notices.append(f"{cut} of {len(captions)} captions are longer than the text encoder reads; cut off.")
