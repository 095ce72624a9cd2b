"""Adapters with adapters: combine, resize, compare, look into, and extract from two bases."""

from lora_kit.algebra.combine import Combined, CombineOptions, combine
from lora_kit.algebra.compare import Comparison, ModulePair, compare_adapters
from lora_kit.algebra.extract import Extracted, ExtractOptions, extract
from lora_kit.algebra.inspection import Inspection, inspect_file
from lora_kit.algebra.lowrank import Budget
from lora_kit.algebra.lowrank_files import OpenedAdapter, open_adapters
from lora_kit.algebra.lowrank_report import ModuleLoss, total_loss
from lora_kit.algebra.resize import Resized, resize
from lora_kit.algebra.spectrum import UpdateSpectrum, spectrum

__all__ = [
    "Budget",
    "CombineOptions",
    "Combined",
    "Comparison",
    "ExtractOptions",
    "Extracted",
    "Inspection",
    "ModuleLoss",
    "ModulePair",
    "OpenedAdapter",
    "Resized",
    "UpdateSpectrum",
    "combine",
    "compare_adapters",
    "extract",
    "inspect_file",
    "open_adapters",
    "resize",
    "spectrum",
    "total_loss",
]
