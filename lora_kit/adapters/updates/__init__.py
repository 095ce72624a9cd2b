"""One neutral form per method: what an adapter does to one module. Needs torch alone."""

from lora_kit.adapters.updates.base import Factors, Parts, Shape, Update
from lora_kit.adapters.updates.build import METHODS, build_update
from lora_kit.adapters.updates.full import FullUpdate, NormUpdate
from lora_kit.adapters.updates.glora import GloraUpdate
from lora_kit.adapters.updates.ia3 import Ia3Update
from lora_kit.adapters.updates.loha import LohaUpdate
from lora_kit.adapters.updates.lokr import LokrUpdate
from lora_kit.adapters.updates.lora import LoraUpdate
from lora_kit.adapters.updates.oft import BoftUpdate, OftUpdate

__all__ = [
    "METHODS",
    "BoftUpdate",
    "Factors",
    "FullUpdate",
    "GloraUpdate",
    "Ia3Update",
    "LohaUpdate",
    "LokrUpdate",
    "LoraUpdate",
    "NormUpdate",
    "OftUpdate",
    "Parts",
    "Shape",
    "Update",
    "build_update",
]
