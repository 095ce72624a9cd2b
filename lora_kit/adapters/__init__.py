"""Adapters in live networks and in files.

Names are imported when they are first used (PEP 562): live layers need PEFT, whose import takes seconds, and files and
merges need none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kit.first_use import imported_on_first_use

if TYPE_CHECKING:
    from lora_kit.adapters.formats.family import family_of
    from lora_kit.adapters.formats.header import CaptionFacts, TrainingFacts, public_recipe, training_metadata
    from lora_kit.adapters.formats.write import refusals, write_adapter
    from lora_kit.adapters.formats.write_kohya import write_kohya
    from lora_kit.adapters.fusing import FuseReport, fuse, unfuse
    from lora_kit.adapters.injection import eject, inject, trainable_parameters
    from lora_kit.adapters.io import RawAdapter, fitted, read_adapter, read_raw
    from lora_kit.adapters.load import load_adapter
    from lora_kit.adapters.scaling import Strength, apply_scales, set_scale, without_adapters
    from lora_kit.adapters.state import AdapterState, adapter_state
    from lora_kit.adapters.updates import LoraUpdate, Update

__all__ = [
    "AdapterState",
    "CaptionFacts",
    "FuseReport",
    "LoraUpdate",
    "RawAdapter",
    "Strength",
    "TrainingFacts",
    "Update",
    "adapter_state",
    "apply_scales",
    "eject",
    "family_of",
    "fitted",
    "fuse",
    "inject",
    "load_adapter",
    "public_recipe",
    "read_adapter",
    "read_raw",
    "refusals",
    "set_scale",
    "trainable_parameters",
    "training_metadata",
    "unfuse",
    "without_adapters",
    "write_adapter",
    "write_kohya",
]

_HOMES = {
    "AdapterState": "state",
    "CaptionFacts": "formats.header",
    "FuseReport": "fusing",
    "LoraUpdate": "updates",
    "RawAdapter": "io",
    "Strength": "scaling",
    "TrainingFacts": "formats.header",
    "Update": "updates",
    "adapter_state": "state",
    "apply_scales": "scaling",
    "eject": "injection",
    "family_of": "formats.family",
    "fitted": "io",
    "fuse": "fusing",
    "inject": "injection",
    "load_adapter": "load",
    "public_recipe": "formats.header",
    "read_adapter": "io",
    "read_raw": "io",
    "refusals": "formats.write",
    "set_scale": "scaling",
    "trainable_parameters": "injection",
    "training_metadata": "formats.header",
    "unfuse": "fusing",
    "without_adapters": "scaling",
    "write_adapter": "formats.write",
    "write_kohya": "formats.write_kohya",
}

__getattr__ = imported_on_first_use(__name__, _HOMES)
