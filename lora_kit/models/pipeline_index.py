"""A diffusers pipeline's model_index.json: which part lies where, and can it be read? Imports no diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from lora_kit.errors import ModelError

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class PipelineKind(NamedTuple):
    """What a pipeline's folder holds."""

    folders: dict[str, str]
    """Part as lora_kit calls it → the sub-folder, which is what the index calls it."""
    classes: dict[str, tuple[str, ...]]
    """Part → the classes that it may have."""
    family: str | None = None
    """Of every base of this kind; None: its configs tell."""


STABLE_DIFFUSION = PipelineKind(
    {part: part for part in PARTS},
    {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",)},
)
KINDS: dict[str, PipelineKind] = {
    "LDMTextToImagePipeline": PipelineKind(
        {part: part for part in PARTS} | {"vae": "vqvae", "text_encoder": "bert"},
        {
            "unet": ("UNet2DConditionModel",),
            "vae": ("AutoencoderKL", "VQModel"),
            "text_encoder": ("LDMBertModel",),
            "tokenizer": ("BertTokenizer", "BertTokenizerFast"),
        },
        "ldm-text2im",
    ),
}
"""Pipelines that call their parts otherwise than Stable Diffusion's, by class."""


def kind_of(index: Mapping[str, Any]) -> PipelineKind:
    """What the pipeline's class says of its folder: Stable Diffusion's where it is none of KINDS."""
    return KINDS.get(str(index.get("_class_name")), STABLE_DIFFUSION)


def index_in(folder: Path) -> Path:
    """The index's path. Raises ModelError if the folder has none."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} is a folder without model_index.json, so not a diffusers pipeline. Give the folder that "
            f"holds {', '.join(PARTS)} (what `save_pretrained` writes), or a single .safetensors checkpoint."
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


def check_index(index: Mapping[str, Any], source: str) -> PipelineKind:
    """The pipeline's kind. Raises ModelError unless it has that kind's parts."""
    name, kind = str(index.get("_class_name", "an unnamed pipeline")), kind_of(index)
    parts = {part: class_of(index, kind, part) for part in kind.folders}
    lacking = [kind.folders[part] for part, found in parts.items() if found is None]
    if lacking or "text_encoder_2" in index:
        detail = f"its model_index.json names no {', no '.join(lacking)}" if lacking else "it has two text encoders"
        raise ModelError(
            f"{source} is a {name}: {detail}. Supported so far: Stable Diffusion v1 and v2, text to image, and "
            f"{', '.join(KINDS)}."
        )
    for part, allowed in kind.classes.items():
        if parts[part] not in allowed:
            raise ModelError(
                f"{source} is a {name} whose {kind.folders[part]} is a {parts[part]}; supported so far: "
                f"{' and '.join(allowed)}."
            )
    return kind


def class_of(index: Mapping[str, Any], kind: PipelineKind, part: str) -> str | None:
    """The class that the index names for a part (`AutoencoderKL`), or None."""
    entry: Any = index.get(kind.folders[part]) or [None, None]
    return None if entry[1] is None else str(entry[1])
