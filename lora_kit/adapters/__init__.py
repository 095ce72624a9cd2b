"""Adapters in live networks and in files."""

from lora_kit.adapters.formats.header import CaptionFacts, TrainingFacts, family_of, public_recipe, training_metadata
from lora_kit.adapters.formats.write import refusals, write_adapter
from lora_kit.adapters.formats.write_kohya import write_kohya
from lora_kit.adapters.inject import eject, inject, trainable_parameters
from lora_kit.adapters.io import RawAdapter, fitted, read_adapter, read_raw
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
    "fitted",
    "inject",
    "load_adapter",
    "public_recipe",
    "read_adapter",
    "read_raw",
    "refusals",
    "set_scales",
    "trainable_parameters",
    "training_metadata",
    "write_adapter",
    "write_kohya",
]
