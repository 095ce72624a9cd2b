"""kohya's layout (sd-scripts), which AUTOMATIC1111, ComfyUI, InvokeAI and diffusers read, and LyCORIS's in it.

Per module `<prefix>_<dotted name with "_" for ".">` + `.lora_down.weight`, `.lora_up.weight`, `.alpha` (for the other
methods see `formats.lycoris`). "_" is also inside names, so a spelling is found by looking it up among the model's
flattened names, never by splitting it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_kit.adapters.formats.layout import Key, RawUpdate, with_text_model
from lora_kit.adapters.formats.lycoris import SUFFIXES
from lora_kit.targeting import canonical_name

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
WRAPPER_PREFIX = "lycoris"
"""What LyCORIS's own wrapper (`create_lycoris`) puts before the names of whatever network it wraps: for us the UNet."""
_PREFIXES = (*PREFIXES.values(), WRAPPER_PREFIX)


class Kohya:
    """The layout's reader."""

    name = "kohya"

    def parse(self, key: str) -> Key | None:
        """`lora_unet_x.lora_down.weight` → (`lora_unet_x`, `down`)."""
        module, _, suffix = key.partition(".")
        if suffix not in SUFFIXES or not module.startswith(tuple(f"{one}_" for one in _PREFIXES)):
            return None
        return Key(module, SUFFIXES[suffix])

    def spellings(self, names: Iterable[str]) -> dict[str, str]:
        """Both with and without the text encoder's inner `text_model`; the UNet's also as LyCORIS's wrapper has it."""
        found: dict[str, str] = {}
        for name in names:
            found[_flat(with_text_model(name))] = name
            if name.startswith("unet."):
                found[_flat(name).replace(PREFIXES["unet"], WRAPPER_PREFIX, 1)] = name
            found[_flat(canonical_name(name))] = name
        return found

    def alphas(self, updates: Mapping[str, RawUpdate], metadata: Mapping[str, str]) -> dict[str, float]:
        """None: this layout keeps alpha in tensors."""
        return {}


def kohya_name(name: str) -> str:
    """`unet.mid_block.attentions.0.proj_in` → `lora_unet_mid_block_attentions_0_proj_in`.

    The text encoder is always written with its inner `text_model`, which all readers know.
    """
    return _flat(with_text_model(name))


def _flat(name: str) -> str:
    component, _, rest = name.partition(".")
    return f"{PREFIXES[component]}_{rest.replace('.', '_')}"
