"""What all writers share: casting, alpha, and which of the header's facts go along."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_kit.adapters.formats import cloneofsimo
from lora_kit.adapters.formats.diffusers import COMPONENTS, CONFIG_KEY
from lora_kit.adapters.state import AdapterState
from lora_kit.errors import AdapterFileError

CAPTION_KEYS = ("ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_datasets", "modelspec.tags")
"""What publishes the user's captions and folder names. `ss_datasets` holds both, per resolution."""


def check_writable(state: AdapterState, layout: str) -> None:
    """Raise AdapterFileError for an empty adapter, and for a component that the layout has no name for."""
    if not state.updates:
        raise AdapterFileError("the adapter has no updates, there is nothing to write")
    others = sorted({name.partition(".")[0] for name in state.updates} - set(COMPONENTS))
    if others:
        raise AdapterFileError(f"{', '.join(others)}: {layout} knows only {', '.join(COMPONENTS)}")


def cast(part: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    """The part on the CPU, in `dtype` (None: as it is). Raises AdapterFileError if it is not finite then."""
    wanted = dtype if dtype is not None and part.is_floating_point() else part.dtype
    found = part.detach().to("cpu", wanted)
    if not bool(torch.isfinite(found).all()):
        raise AdapterFileError(f"{name}: a part holds NaN or infinite values in {found.dtype}; nothing was written")
    return found


def alpha_tensor(alpha: float) -> Tensor:
    """0-d fp32 as everyone writes it; fp64 where fp32 would change the number."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if float(single) == alpha else torch.tensor(alpha, dtype=torch.float64)


def carried(metadata: Mapping[str, str], captions: bool = True) -> dict[str, str]:
    """The header's facts about the adapter, without those about its old file: hashes, PEFT's config, positions.

    diffusers refuses a kohya file that still has the config of another layout. captions: False leaves out what
    publishes the training set's captions and folder names.
    """
    kept = {
        key: text
        for key, text in cloneofsimo.carried(metadata).items()
        if key != CONFIG_KEY and not key.startswith("sshs_")
    }
    return kept if captions else {key: text for key, text in kept.items() if key not in CAPTION_KEYS}
