"""From the recipe's `model` section to a ModelBundle."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig

from lora_kit.allocator import pages_of_their_own
from lora_kit.errors import ModelError
from lora_kit.models import tokenizers
from lora_kit.models.attention import use_attention
from lora_kit.models.bundle import Family, FirstStage, ModelBundle
from lora_kit.models.diffusers_layout import DiffusersBase
from lora_kit.models.family.families import recognise
from lora_kit.models.family.ldm_text2im import recognise_ldm
from lora_kit.models.family.super_resolution import recognise_super_resolution
from lora_kit.models.first_stage import first_stage_class
from lora_kit.models.layout import Configs, Layout
from lora_kit.models.single_file import ldm_prediction
from lora_kit.models.single_file.checkpoint_file import SUFFIXES, open_checkpoint
from lora_kit.models.single_file.ldm_layout import LdmCheckpoint
from lora_kit.models.text_models import TextModel, text_model
from lora_kit.models.unets import UNet, unet_class
from lora_kit.recipe.base import PredictionType
from lora_kit.recipe.sections import ModelSection

TINY = "tiny"
TINY_FOLDER = Path(__file__).parent.parent / "assets" / "tiny_base"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@pages_of_their_own()
def load_bundle(
    section: ModelSection,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ModelBundle:
    """Load a base on the CPU, frozen and in eval mode.

    UNet and text encoder are read straight into `dtype`, the VAE into `vae_dtype` (SD's overflows in fp16): one
    copy in memory. With `weights: fresh`, UNet and text encoder are initialised from `seed` instead.
    Raises ModelError where the base cannot be found, recognised or read.
    """
    with open_layout(section) as layout:
        configs = layout.configs()
        fresh = section.weights == "fresh"
        bundle = ModelBundle(
            **_facts(section, configs),
            unet=fresh_unet(configs, dtype, seed) if fresh else layout.unet(dtype),
            vae=layout.vae(vae_dtype),
            text_encoder=None,
            tokenizer=None,
        )
        if configs.text_encoder is not None:
            bundle.text_encoder = fresh_text_encoder(configs, dtype, seed) if fresh else layout.text_encoder(dtype)
            bundle.tokenizer = layout.tokenizer()
            tokenizers.check(bundle.tokenizer, configs.text_encoder.vocab_size, section.base)
    for network in bundle.networks:
        network.eval().requires_grad_(False)
    use_attention(section.attention, bundle.unet, bundle.vae)
    return bundle


def skeleton(section: ModelSection) -> ModelBundle:
    """Lay a base out on the meta device, from its configs alone: shapes without weights, and no tokenizer.

    Of a single file only the header is read, of a hub id only the config files are fetched.
    """
    with open_layout(section) as layout:
        configs = layout.configs()
    with torch.device("meta"):
        return ModelBundle(
            **_facts(section, configs),
            unet=cast(UNet, unet_class(configs.unet).from_config(configs.unet)),
            vae=cast(FirstStage, first_stage_class(configs.vae, section.base).from_config(configs.vae)),
            text_encoder=text_model(configs.text_encoder) if configs.text_encoder is not None else None,
            tokenizer=None,
        )


def prediction_is_open(section: ModelSection) -> bool:
    """Whether loading would ask what the network predicts: neither the section nor a single file's header says it."""
    path = Path(section.base).expanduser()
    if section.prediction_type is not None or section.base == TINY or not path.is_file():
        return False
    _check_suffix(path)
    with open_checkpoint(path) as file:
        return ldm_prediction.is_open(file.shapes, file.metadata)


@contextmanager
def open_layout(section: ModelSection) -> Generator[Layout]:
    """Find out what `section.base` is and open it. A path that exists wins over a hub id of the same name."""
    base = section.base
    if base == TINY:
        yield DiffusersBase(_tiny_folder(), section)
        return
    path = Path(base).expanduser()
    if path.is_dir():
        yield DiffusersBase(path, section)
    elif path.is_file():
        _check_suffix(path)
        with open_checkpoint(path) as file:
            yield LdmCheckpoint(file, section)
    elif path.suffix in SUFFIXES or not _HUB_ID.fullmatch(base) or base.startswith("."):
        raise ModelError(
            f"model.base: there is no file or folder {path.absolute()}. A base is a diffusers folder, a .safetensors "
            f"or .ckpt file, a hub id such as owner/name, or `tiny`."
        )
    else:
        yield DiffusersBase(base, section)


def fresh_unet(configs: Configs, dtype: torch.dtype, seed: int) -> UNet:
    """A UNet with new weights. The global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any = cast(UNet, unet_class(configs.unet).from_config(configs.unet))
    return network.to(dtype)


def fresh_text_encoder(configs: Configs, dtype: torch.dtype, seed: int) -> TextModel:
    """A text encoder with new weights. The global random state is left as it was."""
    assert configs.text_encoder is not None, "this base reads no text"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        network: Any = text_model(type(configs.text_encoder).from_dict(configs.text_encoder.to_dict()))
    return network.to(dtype)


def _facts(section: ModelSection, configs: Configs) -> dict[str, Any]:
    """The bundle's fields that need no network; known before any weight is read."""
    prediction_type = section.prediction_type or configs.scheduler.get("prediction_type", "epsilon")
    if prediction_type not in get_args(PredictionType):
        raise ModelError(
            f"{section.base}: its scheduler says that the network predicts {prediction_type!r}; supported are "
            f"{', '.join(get_args(PredictionType))}. If the config is wrong, set model.prediction_type."
        )
    return {
        "family": _family(configs, section.base),
        "scheduler_config": configs.scheduler,
        "prediction_type": prediction_type,
        "source": section.base,
    }


def _family(configs: Configs, source: str) -> Family:
    text = configs.text_encoder
    if text is None:
        return recognise_super_resolution(configs.unet, configs.vae, source)
    if isinstance(text, LDMBertConfig):
        return recognise_ldm(configs.unet, text, source)
    return recognise(configs.unet, text.hidden_size, source)


def _tiny_folder() -> Path:
    if not TINY_FOLDER.is_dir():
        raise ModelError(
            f"model.base: tiny is the base that ships with lora_kit, but this installation has no {TINY_FOLDER}. "
            f"Install the package anew, or rebuild it with scripts/tiny_base."
        )
    return TINY_FOLDER


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ModelError(f"model.base: {path} is a {path.suffix or 'nameless'} file; a base is {', '.join(SUFFIXES)}.")
