"""diffusers' layout in all its ages: `unet.<dotted name>.lora_A.weight` and `.lora_B.weight`, and what came before.

Formerly `.lora.down.weight` and `.up`, `.lora_linear_layer.down` in the text encoder, and until mid-2023 attention
processors: `….attn1.processor.to_q_lora.down.weight`, without the component at first. The names in between are those
that diffusers' own loader maps (diffusers/utils/state_dict_utils.py).

Alpha travels in the header's `lora_adapter_metadata` (JSON of PEFT's LoraConfig, keys prefixed by the component).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kit.adapters.formats.layout import Key, RawUpdate, with_text_model
from lora_kit.adapters.formats.peft_alphas import alphas_of
from lora_kit.adapters.formats.peft_rules import PeftRules, json_object, rules_from
from lora_kit.errors import AdapterFileError
from lora_kit.targeting import canonical_name

COMPONENTS = ("unet", "text_encoder")
CONFIG_KEY = "lora_adapter_metadata"
"""Where the header holds the config."""

_MAX_KEY = 200  # a longer one is no module's; patterns are matched against these
_SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_ATTENTION = {
    "unet": {"to_out": "to_out.0"},
    "text_encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
"""What the processors called an attention's layers → what the module is called."""
_BARE_UNET = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.")
_BARE_TEXT = ("text_model.",)


@dataclass(frozen=True)
class Diffusers:
    """The layout's reader."""

    rules: Mapping[str, PeftRules] = field(default_factory=dict[str, PeftRules])
    """Component → what the header's config says; a file without a config has none."""
    source: str = ""
    """What to call the config in a message."""
    name = "diffusers"

    def parse(self, key: str) -> Key | None:
        """`unet.x.lora_A.weight` → (`unet.x`, `down`)."""
        for suffix, part in _SUFFIXES.items():
            if key.endswith(suffix) and len(key) <= _MAX_KEY:
                name = _whole(key.removesuffix(suffix))
                return Key(_renamed(name), part) if name is not None else None
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
        return alphas_of(updates, self._rules_for, self.source)

    def _rules_for(self, module: str) -> tuple[PeftRules | None, str]:
        component, _, inner = module.partition(".")
        return self.rules.get(component), inner


def with_header(path: Path, metadata: Mapping[str, str]) -> Diffusers:
    """The reader of a file with this header. Raises AdapterFileError for a config that cannot be held."""
    if CONFIG_KEY not in metadata:
        return Diffusers()
    source = f"{path}: the header's {CONFIG_KEY}"
    config = json_object(metadata[CONFIG_KEY], source)
    # `unet.save_lora_adapter` writes the UNet alone, without its prefix, in keys and config alike.
    prefixed: dict[str, dict[str, Any]] = {component: {} for component in COMPONENTS}
    for key, value in config.items():
        component, _, option = key.partition(".")
        target, option = (component, option) if component in COMPONENTS and option else ("unet", key)
        prefixed[target][option] = value
    found = {component: rules_from(own, source) for component, own in prefixed.items() if own}
    if others := [component for component, rules in found.items() if rules.method != "lora"]:
        raise AdapterFileError(f"{source}: diffusers' layout holds LoRA alone; {', '.join(others)} has another method.")
    return Diffusers(found, source)


def _whole(name: str) -> str | None:
    """The name with its component, or None if it begins like no Stable Diffusion module."""
    if name.startswith(tuple(f"{component}." for component in COMPONENTS)):
        return name
    if name.startswith(_BARE_UNET):
        return f"unet.{name}"
    return f"text_encoder.{name}" if name.startswith(_BARE_TEXT) else None


def _renamed(name: str) -> str:
    """`….attn1.processor.to_out` → `….attn1.to_out.0`; `….self_attn.to_q` → `….self_attn.q_proj`."""
    component, _, _ = name.partition(".")
    parent, _, layer = name.replace(".processor.", ".").rpartition(".")
    return f"{parent}.{_ATTENTION[component].get(layer, layer)}"
