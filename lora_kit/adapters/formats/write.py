"""Write an adapter in a layout by its name, or tell beforehand what that layout cannot hold."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_kit.adapters.formats.diffusers import COMPONENTS
from lora_kit.adapters.formats.write_common import carried
from lora_kit.adapters.formats.write_diffusers import write_diffusers
from lora_kit.adapters.formats.write_kohya import write_kohya
from lora_kit.adapters.formats.write_lora import unholdable
from lora_kit.adapters.formats.write_peft import write_peft
from lora_kit.adapters.state import AdapterState
from lora_kit.errors import AdapterFileError

WRITERS = {"kohya": write_kohya, "diffusers": write_diffusers, "peft": write_peft}


def refusals(state: AdapterState, layout: str) -> dict[str, str]:
    """Module → why the layout cannot hold its update bit for bit; empty if it holds them all.

    kohya's layout with LyCORIS's suffixes holds every method.
    """
    if layout == "kohya":
        return {}
    found: dict[str, str] = {}
    for component in COMPONENTS:
        found |= unholdable({name: one for name, one in state.updates.items() if name.startswith(f"{component}.")})
    return found


def write_adapter(
    path: Path, state: AdapterState, layout: str, dtype: torch.dtype | None = None, captions: bool = True
) -> None:
    """Write in `kohya`, `diffusers` or `peft`, whole or not at all, with the same bytes for the same content.

    Header facts go along, those that publish captions only if `captions`. Raises AdapterFileError, before anything
    is written, if the layout cannot hold an update (`refusals`) or the learned tokens that came with the adapter, which
    only kohya's can.
    """
    if problems := refusals(state, layout):
        name, reason = next(iter(problems.items()))
        raise AdapterFileError(f"{layout}'s layout cannot hold {len(problems)} of the updates: {name}: {reason}")
    if state.embeddings and layout != "kohya":
        raise AdapterFileError(f"{layout}'s layout cannot hold learned tokens: {', '.join(state.embeddings)}")
    WRITERS[layout](path, state._replace(metadata=carried(state.metadata, captions)), dtype)
