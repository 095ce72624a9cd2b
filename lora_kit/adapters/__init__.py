"""Adapters in live networks and in files."""

from lora_kit.adapters.formats.header import CaptionFacts, TrainingFacts, family_of, public_recipe, training_metadata
from lora_kit.adapters.formats.kohya import write_kohya
from lora_kit.adapters.inject import eject, inject, trainable_parameters
from lora_kit.adapters.io import RawAdapter, read_adapter, read_raw
from lora_kit.adapters.load import load_adapter
from lora_kit.adapters.scaling import set_scales
from lora_kit.adapters.state import AdapterState, adapter_state
from lora_kit.adapters.updates import LoraUpdate, Update

__all__ = [
    "AdapterState",
    "CaptionFacts",
    "LoraUpdate",
    "RawAdapter",
    "TrainingFacts",
    "Update",
    "adapter_state",
    "eject",
    "family_of",
    "inject",
    "load_adapter",
    "public_recipe",
    "read_adapter",
    "read_raw",
    "set_scales",
    "trainable_parameters",
    "training_metadata",
    "write_kohya",
]
