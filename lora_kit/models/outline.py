"""What a base consists of, as fast as it can be told: from configs or a file's header, without diffusers if it can.

Importing diffusers takes several seconds, most of what `lora-kit plan` may take in all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError, safe_open

from lora_kit.models.architecture import UnknownArchitectureError, text_encoder_tree, unet_tree, vae_tree
from lora_kit.models.family.family_names import PIPELINE_FAMILIES, family_name, fills_masks
from lora_kit.models.ldm_bert_tree import MODEL_TYPE, ldm_bert_tree, uncalled_parameters
from lora_kit.models.pipeline_index import parts_of
from lora_kit.models.single_file import ldm_configs, ldm_prediction
from lora_kit.models.single_file.ldm_keys import structure
from lora_kit.recipe.sections import ModelSection
from lora_kit.targeting import ModuleInfo

TINY_FOLDER = Path(__file__).parent.parent / "assets" / "tiny_base"  # as in models.loading, which imports torch


class Outline(NamedTuple):
    """A base without its weights."""

    tree: list[ModuleInfo]
    """Modules of UNet and text encoder, as `module_tree` gives them."""
    parameters: dict[str, int]
    """Of `unet`, `text_encoder` and `vae`."""
    prediction_type: str | None = None
    """What the scheduler's config says that the network predicts, and below how many timesteps it has; None where they
    are not there to be read."""
    timesteps: int | None = None
    family: str = ""
    """`sd1`, …"""
    side_step: int = 0
    """Of a super-resolution base, what the sides of training pictures must be multiples of; 0: another base."""


class _Configs(NamedTuple):
    unet: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any]
    family: str = ""
    """Where the pipeline's class tells."""


def read_outline(section: ModelSection) -> Outline:
    """The base's modules and sizes. Loads no weights; raises ModelError as `skeleton` does.

    Local Stable Diffusion v1 and v2 bases are described from their configs alone. Everything else, and every
    error, is left to `skeleton`, which takes the time to import diffusers.
    """
    try:
        return _described(_configs(section))._replace(**_schedule(section))
    except (UnknownArchitectureError, LookupError, TypeError, ValueError, OSError, SafetensorError):
        return _built(section)


def _configs(section: ModelSection) -> _Configs:
    path = TINY_FOLDER if section.base == "tiny" else Path(section.base).expanduser()
    if path.is_dir():
        index = _read_json(path / "model_index.json")
        pipeline = index.get("_class_name", "")
        folders = {part: parts_of(pipeline)[part].folder for part in ("unet", "text_encoder", "vae")}
        read = {part: _read_json(path / folder / "config.json") for part, folder in folders.items()}
        if not set(folders.values()) <= index.keys() or "text_encoder_2" in index:
            raise UnknownArchitectureError
        return _Configs(**read, family=PIPELINE_FAMILIES.get(pipeline, ""))
    if path.suffix != ".safetensors":
        raise UnknownArchitectureError
    with cast(Any, safe_open(path, framework="np")) as file:  # np: torch is not needed for the header
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    form = structure(shapes)
    unet, vae = ldm_configs.unet_config(shapes, form), ldm_configs.vae_config(shapes, form, 1.0)
    return _Configs(unet, ldm_configs.text_config(shapes, form), vae)


def _schedule(section: ModelSection) -> dict[str, Any]:
    """The outline's facts of a folder's scheduler; nothing where there is none, which loading will tell."""
    path = TINY_FOLDER if section.base == "tiny" else Path(section.base).expanduser()
    if path.is_file():
        return _file_schedule(section, path)
    config = path / "scheduler" / "scheduler_config.json"
    if not config.is_file():
        return {}
    read = _read_json(config)
    return {"prediction_type": read.get("prediction_type", "epsilon"), "timesteps": read.get("num_train_timesteps")}


def _file_schedule(section: ModelSection, path: Path) -> dict[str, Any]:
    with cast(Any, safe_open(path, framework="np")) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        metadata: dict[str, str] = file.metadata() or {}
    if section.prediction_type is None and ldm_prediction.is_open(shapes, metadata):
        raise UnknownArchitectureError  # loading asks for it
    predicts = ldm_prediction.told_by(metadata) or section.prediction_type or "epsilon"
    return {"prediction_type": predicts, "timesteps": ldm_configs.SCHEDULER["num_train_timesteps"]}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _described(configs: _Configs) -> Outline:
    is_bert = configs.text_encoder.get("model_type") == MODEL_TYPE
    if is_bert == (configs.family == "") or configs.vae.get("_class_name") == "VQModel":
        raise UnknownArchitectureError
    unet = unet_tree(configs.unet)
    text = ldm_bert_tree(configs.text_encoder) if is_bert else text_encoder_tree(configs.text_encoder)
    text_width = text[-1].shape[0]  # of the final norm
    unet_config = configs.unet
    if unet_config["cross_attention_dim"] != text_width:
        raise UnknownArchitectureError
    if unet_config["in_channels"] != unet_config["out_channels"] and not fills_masks(unet_config):
        raise UnknownArchitectureError
    unused = uncalled_parameters(configs.text_encoder) if is_bert else 0
    parameters = {"unet": _count(unet), "text_encoder": _count(text) + unused, "vae": _count(vae_tree(configs.vae))}
    return Outline([*unet, *text], parameters, family=configs.family or family_name(unet_config))


def _built(section: ModelSection) -> Outline:
    from lora_kit.models.loading import skeleton
    from lora_kit.targeting import module_tree

    bundle = skeleton(section)
    tree = module_tree(bundle.components)
    networks = {**bundle.components, "vae": bundle.vae}
    sizes = {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}
    config = bundle.scheduler_config
    predicts, count = config.get("prediction_type", "epsilon"), config.get("num_train_timesteps")
    side_step = getattr(bundle.family, "side_step", 0)
    return Outline(tree, sizes, predicts, count, bundle.family.name, side_step)


def _count(tree: Sequence[ModuleInfo]) -> int:
    return sum(module.parameters for module in tree)
