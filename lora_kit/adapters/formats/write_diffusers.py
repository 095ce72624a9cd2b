"""Write diffusers' layout (`pytorch_lora_weights.safetensors`), with alpha in the header as diffusers itself does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kit.adapters.formats.container import write_safetensors
from lora_kit.adapters.formats.diffusers import COMPONENTS, CONFIG_KEY
from lora_kit.adapters.formats.layout import with_text_model
from lora_kit.adapters.formats.write_common import carried, check_writable
from lora_kit.adapters.formats.write_lora import MAGNITUDE, lora_config, lora_tensors
from lora_kit.adapters.state import AdapterState
from lora_kit.adapters.updates import Update
from lora_kit.targeting import canonical_name

_OLDER = {".lora_A.weight": ".lora_linear_layer.down.weight", ".lora_B.weight": ".lora_linear_layer.up.weight"}
_ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".out_proj")


def write_diffusers(path: Path, state: AdapterState, dtype: torch.dtype | None = None) -> None:
    """Write the adapter, whole or not at all, with the same bytes for the same content.

    The updates must be holdable (`write_lora.unholdable`). Raises AdapterFileError for an empty adapter, another
    component than UNet and text encoder, and a factor that is not finite (after the cast).
    """
    check_writable(state, "diffusers")
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for component in COMPONENTS:
        own = {name: update for name, update in state.updates.items() if name.startswith(f"{component}.")}
        if not own:
            continue
        tensors |= _tensors(own, dtype, _spellings(own))
        # Without the text encoder's inner `text_model`: PEFT matches the end of a name, so both spellings are found.
        inner = {canonical_name(name).partition(".")[2]: update for name, update in own.items()}
        config |= {f"{component}.{key}": value for key, value in lora_config(inner).items()}
    header = carried(state.metadata) | {CONFIG_KEY: json.dumps(config, indent=2, sort_keys=True)}
    write_safetensors(path, tensors, header)


def _tensors(updates: Mapping[str, Update], dtype: torch.dtype | None, renamed: Mapping[str, str]) -> dict[str, Tensor]:
    """Keys as diffusers has them; the text encoder with its inner `text_model`, which all versions read."""
    return {
        with_text_model(name) + renamed.get(suffix, suffix): tensor
        for name, update in updates.items()
        for suffix, tensor in lora_tensors(name, update, dtype).items()
    }


def _spellings(updates: Mapping[str, Update]) -> Mapping[str, str]:
    """What the text encoder's keys end in, where it is not as in PEFT.

    diffusers 0.42 recognises a text encoder by its attention layers or by the older names, and hands it to
    transformers 5, which finds a magnitude only with `.weight` behind it. The UNet goes to PEFT, which takes both.
    """
    if not any(name.startswith("text_encoder.") for name in updates):
        return {}
    attention = any(name.endswith(_ATTENTION) for name in updates)
    return {MAGNITUDE: f"{MAGNITUDE}.weight"} | ({} if attention else _OLDER)
