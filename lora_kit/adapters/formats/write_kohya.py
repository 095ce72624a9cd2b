"""Write kohya's layout (sd-scripts), with LyCORIS's suffixes for every method but LoRA."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lora_kit.adapters.formats.bundled import bundled_tensors
from lora_kit.adapters.formats.container import data_hash, legacy_hash, serialise
from lora_kit.adapters.formats.kohya import kohya_name
from lora_kit.adapters.formats.lycoris import SUFFIX_OF
from lora_kit.adapters.formats.write_common import alpha_tensor, carried, cast, check_writable
from lora_kit.adapters.state import AdapterState
from lora_kit.adapters.updates import Update
from lora_kit.errors import AdapterFileError
from lora_kit.files import write_atomically


def kohya_tensors(state: AdapterState, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The file's tensors: parts in `dtype` (default: as they are), alpha as a 0-d fp32.

    Raises AdapterFileError for an empty adapter, for a component kohya's layout has no prefix for, and for a part
    that is not finite (after the cast).
    """
    check_writable(state, "kohya")
    tensors: dict[str, Tensor] = {}
    count = 0
    for name, update in state.updates.items():
        own = _tensors(name, update, dtype)
        tensors |= own
        count += len(own)
    if len(tensors) != count:
        raise AdapterFileError("two modules of this model have the same name in kohya's layout; it cannot hold both")
    for key, vectors in bundled_tensors(state.embeddings).items():
        tensors[key] = cast(vectors, dtype, key)
    return tensors


def write_kohya(path: Path, state: AdapterState, dtype: torch.dtype | None = None) -> str:
    """Write the adapter, whole or not at all, with the same bytes for the same content.

    Adds sd-scripts' two hashes to the metadata and returns `sshs_model_hash` (sha256 of the bytes after the header).
    """
    tensors = kohya_tensors(state, dtype)
    own = carried(state.metadata)
    hashed = serialise(tensors, {key: value for key, value in own.items() if key.startswith("ss_")})
    model_hash = data_hash(hashed)
    metadata = own | {"sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash(hashed)}
    data = serialise(tensors, metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    return model_hash


def _tensors(name: str, update: Update, dtype: torch.dtype | None) -> dict[str, Tensor]:
    flat = kohya_name(name)
    found = {f"{flat}.{SUFFIX_OF[part]}": cast(tensor, dtype, name) for part, tensor in update.parts().items()}
    return found if update.alpha is None else found | {f"{flat}.alpha": alpha_tensor(update.alpha)}
