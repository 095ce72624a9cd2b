"""Write PEFT's layout: a folder for one network, or a folder with `unet/` and `text_encoder/` for both."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from lora_kit.adapters.formats.container import write_safetensors
from lora_kit.adapters.formats.diffusers import COMPONENTS
from lora_kit.adapters.formats.peft import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from lora_kit.adapters.formats.write_common import carried, check_writable
from lora_kit.adapters.formats.write_lora import lora_config, lora_tensors
from lora_kit.adapters.state import AdapterState
from lora_kit.adapters.updates import Update
from lora_kit.errors import AdapterFileError
from lora_kit.files import sync_folder, sync_tree, write_text


def write_peft(path: Path, state: AdapterState, dtype: torch.dtype | None = None) -> None:
    """Write the folder, whole or not at all, with the same bytes for the same content.

    Names are those of the networks as the installed libraries build them (transformers before 5.6 has an inner
    `text_model` in the text encoder). The updates must be holdable (`write_lora.unholdable`). Raises
    AdapterFileError if `path` exists, for an empty adapter, another component than UNet and text encoder, and a
    factor that is not finite (after the cast).
    """
    check_writable(state, "PEFT")
    if path.exists():
        raise AdapterFileError(f"{path} exists already; name another folder")
    found = {one: _inner(state.updates, one) for one in COMPONENTS}
    networks = {one: updates for one, updates in found.items() if updates}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for component, updates in networks.items():
            folder = temporary / component if len(networks) > 1 else temporary
            _write_network(folder, updates, carried(state.metadata), dtype)
        sync_tree(temporary)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def _inner(updates: Mapping[str, Update], component: str) -> dict[str, Update]:
    prefix = f"{component}."
    return {name.removeprefix(prefix): update for name, update in updates.items() if name.startswith(prefix)}


def _write_network(
    folder: Path, updates: Mapping[str, Update], metadata: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    folder.mkdir(parents=True)
    tensors = {
        f"{PREFIX}{name}{suffix}": tensor
        for name, update in updates.items()
        for suffix, tensor in lora_tensors(name, update, dtype).items()
    }
    write_safetensors(folder / WEIGHTS_FILE, tensors, metadata)
    config = lora_config(updates) | {"inference_mode": True, "task_type": None, "base_model_name_or_path": None}
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
