"""A diffusers pipeline's model_index.json: is it one of Stable Diffusion's? Imports no diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lora_kit.errors import ModelError

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


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


def check_index(index: Mapping[str, Any], source: str) -> None:
    """Raise ModelError unless the pipeline is of SD's parts."""
    kind = str(index.get("_class_name", "an unnamed pipeline"))
    parts: dict[str, str] = {part: str((index.get(part) or [None, None])[1]) for part in PARTS}
    lacking = [part for part in PARTS if parts[part] == "None"]
    if lacking or "text_encoder_2" in index:
        detail = f"its model_index.json names no {', no '.join(lacking)}" if lacking else "it has two text encoders"
        raise ModelError(
            f"{source} is a {kind}: {detail}. Supported so far: Stable Diffusion v1 and v2, text to image."
        )
    wanted = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    for part, name in wanted.items():
        if parts[part] != name:
            raise ModelError(f"{source} is a {kind} whose {part} is a {parts[part]}; supported so far: {name}.")
