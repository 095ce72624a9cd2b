"""What a base consists of, as fast as it can be told: from configs or a file's header, without diffusers if it can.

Importing diffusers takes several seconds, most of what `lora-kit plan` may take in all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError, safe_open

from lora_kit.models import ldm_configs, ldm_prediction
from lora_kit.models.architecture import UnknownArchitectureError, text_encoder_tree, unet_tree, vae_tree
from lora_kit.models.ldm_keys import structure
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


class _Configs(NamedTuple):
    unet: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any]


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
        read = {part: _read_json(path / part / "config.json") for part in ("unet", "text_encoder", "vae")}
        index = _read_json(path / "model_index.json")
        if not read.keys() <= index.keys() or "text_encoder_2" in index:
            raise UnknownArchitectureError
        return _Configs(**read)
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
    unet, text = unet_tree(configs.unet), text_encoder_tree(configs.text_encoder)
    text_width = text[-1].shape[0]  # of the final norm
    if (configs.unet["in_channels"], configs.unet["cross_attention_dim"]) != (configs.unet["out_channels"], text_width):
        raise UnknownArchitectureError
    parameters = {"unet": _count(unet), "text_encoder": _count(text), "vae": _count(vae_tree(configs.vae))}
    return Outline([*unet, *text], parameters)


def _built(section: ModelSection) -> Outline:
    from lora_kit.models.loading import skeleton
    from lora_kit.targeting import module_tree

    bundle = skeleton(section)
    tree = module_tree(bundle.components)
    networks = {**bundle.components, "vae": bundle.vae}
    sizes = {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}
    config = bundle.scheduler_config
    return Outline(tree, sizes, config.get("prediction_type", "epsilon"), config.get("num_train_timesteps"))


def _count(tree: Sequence[ModuleInfo]) -> int:
    return sum(module.parameters for module in tree)
