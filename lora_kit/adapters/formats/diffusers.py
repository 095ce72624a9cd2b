"""diffusers' layout: `unet.<dotted name>.lora_A.weight` and `.lora_B.weight`, formerly `.lora.down.weight` and `.up`.

Alpha travels in the header's `lora_adapter_metadata` (JSON of PEFT's LoraConfig, keys prefixed by the component).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_kit.adapters.formats.layout import Key, RawUpdate, with_text_model
from lora_kit.errors import AdapterFileError
from lora_kit.targeting import canonical_name

COMPONENTS = ("unet", "text_encoder")
_SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
}


class Diffusers:
    """The layout's reader."""

    name = "diffusers"

    def parse(self, key: str) -> Key | None:
        """`unet.x.lora_A.weight` → (`unet.x`, `down`)."""
        if not key.startswith(tuple(f"{component}." for component in COMPONENTS)):
            return None
        for suffix, part in _SUFFIXES.items():
            if key.endswith(suffix):
                return Key(key.removesuffix(suffix), part)
        return None

    def spellings(self, names: Iterable[str]) -> dict[str, str]:
        """Both with and without the text encoder's inner `text_model`."""
        found: dict[str, str] = {}
        for name in names:
            found[with_text_model(name)] = name
            found[canonical_name(name)] = name
        return found

    def alphas(self, updates: Mapping[str, RawUpdate], metadata: Mapping[str, str]) -> dict[str, float]:
        """Alpha of each module by PEFT's rules: `alpha_pattern` first, then `lora_alpha`."""
        if "lora_adapter_metadata" not in metadata:
            return {}
        config = _config(metadata["lora_adapter_metadata"])
        found: dict[str, float] = {}
        for module, update in updates.items():
            component, _, rest = module.partition(".")
            alpha = _alpha(config, component, rest)
            if alpha is None or update.down is None:
                continue
            rank = update.down.shape[0]
            # rank-stabilised LoRA (Kalajdzievski 2023) scales by alpha / √r instead of alpha / r.
            found[module] = alpha * math.sqrt(rank) if config.get(f"{component}.use_rslora") else alpha
        return found


def _config(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterFileError(f"the header's lora_adapter_metadata is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise AdapterFileError("the header's lora_adapter_metadata is not a JSON object")
    return {str(key): value for key, value in config.items()}


def _alpha(config: Mapping[str, Any], component: str, module: str) -> float | None:
    pattern: dict[str, float] = config.get(f"{component}.alpha_pattern") or {}
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    alpha = config.get(f"{component}.lora_alpha")
    return None if alpha is None else float(alpha)
