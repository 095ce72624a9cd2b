"""One neutral form per method: what an adapter does to one module. Needs torch alone."""

from lora_kit.adapters.updates.base import Factors, Parts, Shape, Update
from lora_kit.adapters.updates.build import build_update
from lora_kit.adapters.updates.lora import LoraUpdate

__all__ = [
    "Factors",
    "LoraUpdate",
    "Parts",
    "Shape",
    "Update",
    "build_update",
]
