"""A diffusers pipeline's model_index.json: which kind it is, and where its parts lie. Imports no diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from lora_kit.errors import ModelError


class Part(NamedTuple):
    """A part of a pipeline."""

    folder: str
    """Its folder, which is its key in the index."""
    classes: tuple[str, ...]
    """What it may be; one of diffusers' and transformers' classes. Empty: anything."""


Parts = Mapping[str, Part]
"""By what lora_kit calls them: `unet`, `vae`, `text_encoder`, `tokenizer`, `scheduler`; a part that the pipeline does
without is not in it."""

_STABLE_DIFFUSION: Parts = {
    "unet": Part("unet", ("UNet2DConditionModel",)),
    "vae": Part("vae", ("AutoencoderKL",)),
    "text_encoder": Part("text_encoder", ("CLIPTextModel",)),
    "tokenizer": Part("tokenizer", ()),
    "scheduler": Part("scheduler", ()),
}
_KINDS: dict[str, Parts] = {
    "LDMSuperResolutionPipeline": {
        "unet": Part("unet", ("UNet2DModel",)),
        "vae": Part("vqvae", ("VQModel",)),
        "scheduler": Part("scheduler", ()),
    },
    "LDMTextToImagePipeline": {
        "unet": Part("unet", ("UNet2DConditionModel",)),
        "vae": Part("vqvae", ("AutoencoderKL", "VQModel")),
        "text_encoder": Part("bert", ("LDMBertModel",)),
        "tokenizer": Part("tokenizer", ("BertTokenizer", "BertTokenizerFast")),
        "scheduler": Part("scheduler", ()),
    },
}
"""Pipelines of other parts than Stable Diffusion's, by their class."""
_SUPPORTED = "Supported so far: Stable Diffusion v1 and v2, and latent-diffusion text-to-image and super-resolution."


def parts_of(pipeline: str) -> Parts:
    """The parts of a pipeline by its class's name: Stable Diffusion's where nothing else is known of it."""
    return _KINDS.get(pipeline, _STABLE_DIFFUSION)


def is_other(pipeline: str) -> bool:
    """Whether the pipeline is none of Stable Diffusion's."""
    return pipeline in _KINDS


def index_in(folder: Path) -> Path:
    """The index's path. Raises ModelError if the folder has none."""
    path = folder / "model_index.json"
    if not path.is_file():
        parts = ", ".join(part.folder for part in _STABLE_DIFFUSION.values())
        raise ModelError(
            f"{folder} is a folder without model_index.json, so not a diffusers pipeline. Give the folder that "
            f"holds {parts} (what `save_pretrained` writes), or a single .safetensors checkpoint."
        )
    return path


def read_index(path: Path) -> dict[str, Any]:
    """The index as a table. Raises ModelError if it is none."""
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}): fetch it again.") from error
    if not isinstance(index, dict):
        raise ModelError(f"{path} is no table of a pipeline's parts: fetch it again.")
    return cast("dict[str, Any]", index)


def check_index(index: Mapping[str, Any], source: str) -> Parts:
    """The pipeline's parts. Raises ModelError unless they are those of a kind that lora_kit knows."""
    kind = str(index.get("_class_name", "an unnamed pipeline"))
    wanted = parts_of(kind)
    named = {name: str((index.get(part.folder) or [None, None])[1]) for name, part in wanted.items()}
    lacking = [wanted[name].folder for name, found in named.items() if found == "None"]
    if lacking or "text_encoder_2" in index:
        detail = f"its model_index.json names no {', no '.join(lacking)}" if lacking else "it has two text encoders"
        raise ModelError(f"{source} is a {kind}: {detail}. {_SUPPORTED}")
    for name, part in wanted.items():
        if part.classes and named[name] not in part.classes:
            allowed = " and ".join(part.classes)
            raise ModelError(
                f"{source} is a {kind} whose {part.folder} is a {named[name]}; supported so far: {allowed}."
            )
    return {name: Part(part.folder, (named[name],)) for name, part in wanted.items()}
