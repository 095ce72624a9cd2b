"""cloneofsimo/lora's layout (2022–23): positional tensors `unet:{i}:up` and `unet:{i}:down`, ΔW = up · down.

The header names the classes whose layers were adapted (`unet` = `["CrossAttention", "Attention", "GEGLU"]`), and an
index counts their linear layers (and convolutions) in the module order of the diffusers of that day: down blocks,
up blocks, middle; in a transformer block the first attention, **then the feed-forward's projection**, then the
second attention. Today's order would put the weights on other layers, silently where shapes agree. Facts from
lora_diffusion/lora.py (`_find_modules_v2`, `extract_lora_ups_down`, `save_safeloras_with_embeds`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_kit.adapters.formats.diffusers import COMPONENTS
from lora_kit.adapters.formats.layout import Key, RawUpdate
from lora_kit.adapters.formats.peft_rules import json_list
from lora_kit.errors import AdapterFileError

EMBEDDING = "<embed>"
"""What the header says of a key that is a learned token."""

_KEY = re.compile(r"(unet|text_encoder):(0|[1-9]\d{0,4}):(up|down)")
_ATTENTION = re.compile(r"\.attn[12]\.to_(q|k|v|out\.0)$")
_CLASSES = {
    "unet": {
        "CrossAttention": _ATTENTION,
        "Attention": _ATTENTION,
        "GEGLU": re.compile(r"\.ff\.net\.0\.proj$"),
        "ResnetBlock2D": re.compile(r"\.resnets\.\d+\.(conv1|time_emb_proj|conv2|conv_shortcut)$"),
    },
    "text_encoder": {"CLIPAttention": re.compile(r"\.self_attn\.(k|v|q|out)_proj$")},
}
"""Component → class name of that day → the layers in it, by their names of today."""
_PARTS = ("down_blocks", "up_blocks", "mid_block")
_IN_BLOCK = ("attn1", "ff", "attn2")
_IN_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")


@dataclass(frozen=True)
class CloneOfSimo:
    """The layout's reader."""

    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Component → the class names that its header lists."""
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Component → how many layers the file has."""
    source: str = ""
    name = "cloneofsimo"

    def parse(self, key: str) -> Key | None:
        """`unet:3:up` → (`unet:3`, `up`)."""
        match = _KEY.fullmatch(key)
        return Key(f"{match[1]}:{match[2]}", match[3]) if match else None

    def spellings(self, names: Iterable[str]) -> dict[str, str]:
        """`unet:3` → the fourth of the layers that the header's classes hold, in the order of that day.

        Raises AdapterFileError if the model has another number of them than the file: then no index can be trusted.
        """
        known = list(names)
        found: dict[str, str] = {}
        for component, classes in self.classes.items():
            ordered = positions(known, component, classes)
            if len(ordered) != self.counts[component]:
                raise AdapterFileError(
                    f"{self.source}: has {self.counts[component]} layers for the {component}, but the model has "
                    f"{len(ordered)} in {', '.join(classes)}. Its keys are positions, so it fits its own model only."
                )
            found |= {f"{component}:{index}": name for index, name in enumerate(ordered)}
        return found

    def alphas(self, updates: Mapping[str, RawUpdate], metadata: Mapping[str, str]) -> dict[str, float]:
        """None: this layout has no alpha, so it is the rank."""
        return {}


def positions(names: Iterable[str], component: str, classes: Iterable[str]) -> list[str]:
    """The component's modules in these classes, in the order in which that day's diffusers registered them."""
    patterns = [_CLASSES[component][one] for one in classes]
    inside = [
        name for name in names if name.startswith(f"{component}.") and any(pattern.search(name) for pattern in patterns)
    ]
    first = {_block(name): index for index, name in reversed(list(enumerate(inside)))}

    def that_day(name: str) -> tuple[int, ...]:
        return (_rank(name, _PARTS), first[_block(name)], _rank(name, _IN_BLOCK), _rank(name, _IN_ATTENTION))

    return sorted(inside, key=that_day)


def with_header(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> CloneOfSimo:
    """The reader of a file with these keys and this header. Raises AdapterFileError if the classes are not told."""
    indices: dict[str, set[int]] = {}
    for key in keys:
        if match := _KEY.fullmatch(key):
            indices.setdefault(match[1], set()).add(int(match[2]))
    classes: dict[str, tuple[str, ...]] = {}
    for component, found in indices.items():
        if missing := sorted(set(range(max(found))) - found):
            raise AdapterFileError(f"{path}: {component}:{missing[0]} is missing ({len(missing)} in all). Get it anew.")
        if component not in metadata:
            raise AdapterFileError(f"{path}: its header does not say which classes of the {component} its layers are.")
        source = f"{path}: the header's {component}"
        classes[component] = tuple(str(one) for one in json_list(metadata[component], source))
        unknown = [one for one in classes[component] if one not in _CLASSES[component]]
        if unknown or not classes[component]:
            raise AdapterFileError(
                f"{source}: lists the classes {ascii(unknown)[:200]}; known: {', '.join(_CLASSES[component])}. "
                "The order of other layers in the diffusers of that day is not known here."
            )
    return CloneOfSimo(classes, {one: len(found) for one, found in indices.items()}, str(path))


def tokens(metadata: Mapping[str, str], keys: Iterable[str]) -> list[str]:
    """The keys that are learned tokens."""
    return [key for key in keys if metadata.get(key) == EMBEDDING]


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """The header without what only this layout's positions need."""
    own = re.compile(rf"({'|'.join(COMPONENTS)})(:\d+:rank)?")
    return {key: text for key, text in metadata.items() if not own.fullmatch(key) and text != EMBEDDING}


def _block(name: str) -> str:
    """The transformer block or attention that the module is in, else its own name."""
    match = re.match(r".*\.(transformer_blocks\.\d+|self_attn)\.", name)
    return match[0] if match else name


def _rank(name: str, order: tuple[str, ...]) -> int:
    """Where the first of `order` that is a part of the name stands in it; 0 if none is."""
    return next((index for index, part in enumerate(order) if f".{part}." in f"{name}."), 0)
