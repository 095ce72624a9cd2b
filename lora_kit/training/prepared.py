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
from lora_kit.models.released import RELEASED, bring, release
from lora_kit.progress import ProgressBar
from lora_kit.recipe import Recipe
from lora_kit.training.caching import ENCODE_BATCH, MOST_CAPTIONS, data_sets, fill_cache, open_cache
from lora_kit.training.encoders import latent_encoder


class PreparedData(NamedTuple):
    """Everything a run reads."""

    training: TrainingSet
    held_out: TrainingSet | None
    texts: tuple[DiskTexts, ...]
    """Captions' states on disk."""
    notices: tuple[str, ...]
    """What the user should be told once about the cache."""
    keeps_texts: bool = False
    """Whether the states of every caption that a step may see are on disk."""

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
    keeps_texts = bool(texts) and all_captions_kept(sets[0])
    return PreparedData(sets[0], sets[1] if len(sets) > 1 else None, texts, notices, keeps_texts)


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
def visiting(bundle: ModelBundle, *names: str) -> Generator[None]:
    """The encoders (all, or those of `names`: `vae`, `text_encoder`) beside the UNet while inside; back where they were
    afterwards, or given back again."""
    own = [name for name in names or RELEASED if getattr(bundle, name) is not None]
    homes = {name: next(getattr(bundle, name).parameters()).device for name in own}
    try:
        for name in own:
            bring(bundle, name, bundle.device)
        yield
    finally:
        for name, home in homes.items():
            if home.type == "meta":
                release(bundle, name)
            else:
                _move(getattr(bundle, name), home)


def rest_encoders(bundle: ModelBundle, data: PreparedData, trains_text: bool) -> list[str]:
    """Give back the weights of the encoders that steps make nothing with, as everything they make is kept; a line for
    the user if there are any. Drawing reads them again (`visiting`), and so does the rare step that needs one after all
    (`bring`), where it then stays."""
    names = [] if data.needs_vae or bundle.family.sees_mask else ["vae"]
    if bundle.has_text and data.keeps_texts and not trains_text:
        names.append("text_encoder")
    sizes = {name: release(bundle, name) for name in names}
    freed = {name: size for name, size in sizes.items() if size}
    if not freed:
        return []
    parts = " and ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in freed.items())
    return [
        f"given back, as steps find what they make at hand: {parts}; read from the base again where they are needed."
    ]


def all_captions_kept(data: TrainingSet) -> bool:
    """Whether no picture has more captions than are kept of one (shuffled tags: such are encoded in each step)."""
    return all(data.possible_captions(record, MOST_CAPTIONS) is not None for record in range(data.record_count))


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
