"""kohya's layout (sd-scripts), which AUTOMATIC1111, ComfyUI, InvokeAI and diffusers read, and LyCORIS's in it.

Per module `<prefix>_<dotted name with "_" for ".">` + `.lora_down.weight`, `.lora_up.weight`, `.alpha` (for the other
methods see `formats.lycoris`). "_" is also inside names, so a spelling is found by looking it up among the model's
flattened names, never by splitting it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_kit.adapters.formats.container import data_hash, legacy_hash, serialise
from lora_kit.adapters.formats.layout import Key, RawUpdate, with_text_model
from lora_kit.adapters.formats.lycoris import SUFFIX_OF, SUFFIXES
from lora_kit.adapters.state import AdapterState
from lora_kit.errors import AdapterFileError
from lora_kit.files import write_atomically
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


def kohya_tensors(state: AdapterState, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The file's tensors: factors in `dtype` (default: as they are), alpha as a 0-d fp32.

    Raises AdapterFileError for an empty adapter, for a component kohya's layout has no prefix for, and for a factor
    that is not finite (after the cast).
    """
    if not state.updates:
        raise AdapterFileError("the adapter has no updates, there is nothing to write")
    tensors: dict[str, Tensor] = {}
    flat: set[str] = set()
    for name, update in state.updates.items():
        if name.partition(".")[0] not in PREFIXES:
            raise AdapterFileError(f"{name}: kohya's layout knows only {', '.join(PREFIXES)}")
        module = kohya_name(name)
        if module in flat:
            raise AdapterFileError(f"two modules have the name {module} in kohya's layout; it cannot hold both")
        flat.add(module)
        for part, tensor in update.parts().items():
            tensors[f"{module}.{SUFFIX_OF[part]}"] = _cast(tensor, dtype, name)
        if update.alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(update.alpha, dtype=torch.float32)
    return tensors


def _cast(factor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    kept = dtype is None or not factor.is_floating_point()
    cast = factor.detach().to("cpu", factor.dtype if kept else dtype)
    if not bool(torch.isfinite(cast).all()):
        raise AdapterFileError(f"{name}: the factor holds NaN or infinite values in {cast.dtype}; nothing was written")
    return cast


def write_kohya(path: Path, state: AdapterState, dtype: torch.dtype | None = None) -> str:
    """Write the adapter, whole or not at all, with the same bytes for the same content.

    Adds sd-scripts' two hashes to the metadata and returns `sshs_model_hash` (sha256 of the bytes after the header).
    """
    tensors = kohya_tensors(state, dtype)
    own = {key: value for key, value in state.metadata.items() if not key.startswith("sshs_")}
    hashed = serialise(tensors, {key: value for key, value in own.items() if key.startswith("ss_")})
    model_hash = data_hash(hashed)
    metadata = own | {"sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash(hashed)}
    data = serialise(tensors, metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    return model_hash
