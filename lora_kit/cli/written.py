"""The file of an adapter that was made from others."""

from __future__ import annotations

from pathlib import Path

from lora_kit.adapters import AdapterState, write_adapter, write_kohya
from lora_kit.models.adapter_layouts import kohya_problem


def write_derived(out: Path, state: AdapterState, family: str) -> None:
    """Write in kohya's layout, or in diffusers' where kohya's has no names for the family.

    Raises AdapterFileError if the layout cannot hold the adapter.
    """
    if kohya_problem(family) is None:
        write_kohya(out, state)
    else:
        write_adapter(out, state, "diffusers")
