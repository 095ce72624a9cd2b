"""PEFT's layout: a folder with `adapter_config.json` and `adapter_model.safetensors`, per network.

Keys are `base_model.model.<dotted name>.lora_A.weight`, with nothing that says which network they are of: names
tell, as none of the UNet's is one of the text encoder's. Two networks are two folders, `unet/` and `text_encoder/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lora_kit.adapters.formats.container import Contents, open_safetensors
from lora_kit.adapters.formats.diffusers import COMPONENTS
from lora_kit.adapters.formats.layout import Key, RawUpdate, with_text_model
from lora_kit.adapters.formats.lycoris import SUFFIXES
from lora_kit.adapters.formats.peft_alphas import alphas_of
from lora_kit.adapters.formats.peft_rules import PeftRules, json_object, rules_from
from lora_kit.errors import AdapterFileError
from lora_kit.targeting import canonical_name

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

_MAX_CONFIG = 4 << 20
_MAX_KEY = 240
_SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_magnitude_vector": "magnitude",
} | {f".{name}": name for name in SUFFIXES if name.startswith(("hada_", "lokr_"))}


@dataclass(frozen=True)
class Peft:
    """The layout's reader."""

    rules: Mapping[str, PeftRules] = field(default_factory=dict[str, PeftRules])
    """Component → its folder's config; the component is "" where one folder holds one network."""
    source: str = ""
    """What to call the configs in a message."""
    name = "peft"

    def parse(self, key: str) -> Key | None:
        """`base_model.model.x.lora_A.weight` → (`x`, `down`); in a component's folder → (`unet.x`, `down`)."""
        component = next((f"{one}." for one in COMPONENTS if key.startswith(f"{one}.{PREFIX}")), "")
        rest = key.removeprefix(component)
        if not rest.startswith(PREFIX) or len(rest) > _MAX_KEY:
            return None
        for suffix, part in _SUFFIXES.items():
            if rest.endswith(suffix):
                return Key(component + rest.removeprefix(PREFIX).removesuffix(suffix), part)
        return None

    def spellings(self, names: Iterable[str]) -> dict[str, str]:
        """With and without the component, and the text encoder's inner `text_model`."""
        found: dict[str, str] = {}
        for name in names:
            for spelling in (with_text_model(name), canonical_name(name)):
                found[spelling] = name
                found[spelling.partition(".")[2]] = name
        return found

    def alphas(self, updates: Mapping[str, RawUpdate], metadata: Mapping[str, str]) -> dict[str, float]:
        """Alpha of each module by PEFT's rules: `alpha_pattern` first, then `lora_alpha`."""
        return alphas_of(updates, self._rules_for, self.source)

    def _rules_for(self, module: str) -> tuple[PeftRules | None, str]:
        component, _, inner = module.partition(".")
        return (self.rules[component], inner) if component in self.rules else (self.rules.get(""), module)


class PeftFolder(NamedTuple):
    """What one or two PEFT folders hold, put together."""

    layout: Peft
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def is_peft_folder(path: Path) -> bool:
    """Whether the path is a folder with a PEFT config, or with `unet/` or `text_encoder/` that have one."""
    return path.is_dir() and bool(_folders(path))


def read_peft_folder(path: Path) -> PeftFolder:
    """All tensors under `unet.base_model.model.…` (or without the component, where the folder does not say it).

    Raises AdapterFileError for what is missing or damaged, and for a config whose tensors mean what cannot be held.
    """
    rules: dict[str, PeftRules] = {}
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for component, folder in _folders(path).items():
        rules[component] = _rules(folder / CONFIG_FILE)
        contents = _weights(folder)
        prefix = f"{component}." if component else ""
        tensors |= {prefix + key: tensor for key, tensor in contents.tensors.items()}
        for key, text in contents.metadata.items():
            own = key if metadata.get(key, text) == text else f"{component}.{key}"
            metadata[own] = text
    return PeftFolder(Peft(rules, f"{path}: {CONFIG_FILE}"), tensors, metadata)


def beside_config(path: Path) -> Peft:
    """The reader of a lone weights file, from the config beside it, without which its alpha is unknown."""
    config = path.with_name(CONFIG_FILE)
    if not config.is_file():
        raise AdapterFileError(
            f"{path}: is in PEFT's layout, whose alpha and method are in {CONFIG_FILE}; there is none beside it. "
            "Put both into one folder."
        )
    return Peft({"": _rules(config)}, f"{config}")


def _folders(path: Path) -> dict[str, Path]:
    """Component → folder; "" for the folder itself."""
    if (path / CONFIG_FILE).is_file():
        return {"": path}
    return {one: path / one for one in COMPONENTS if (path / one / CONFIG_FILE).is_file()}


def _rules(config: Path) -> PeftRules:
    try:
        with config.open("rb") as file:
            text = file.read(_MAX_CONFIG + 1)
    except OSError as error:
        raise AdapterFileError(f"{config}: cannot be read ({error}).") from error
    if len(text) > _MAX_CONFIG:
        raise AdapterFileError(f"{config}: has more than {_MAX_CONFIG} bytes; it is no adapter's config.")
    return rules_from(json_object(text, str(config)), str(config))


def _weights(folder: Path) -> Contents:
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise AdapterFileError(
            f"{folder}: holds adapter_model.bin, a pickle, and no {WEIGHTS_FILE}. Save it anew with "
            "save_pretrained(safe_serialization=True)."
        )
    with open_safetensors(path) as file:
        return Contents(file.tensors(), file.header.metadata)
