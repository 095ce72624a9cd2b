"""Fuse adapters into weights, and check the result; adapters with adapters."""

from lora_kit.merging.combine import Combined, CombineOptions, combine
from lora_kit.merging.compare import Comparison, ModulePair, compare_adapters
from lora_kit.merging.delta import ScaledUpdate, rounding_bound, total_bias_delta, total_delta
from lora_kit.merging.extract import Extracted, ExtractOptions, extract
from lora_kit.merging.inspection import Inspection, inspect_file
from lora_kit.merging.lowrank import Budget
from lora_kit.merging.lowrank_files import OpenedAdapter, open_adapters
from lora_kit.merging.lowrank_report import ModuleLoss, total_loss
from lora_kit.merging.merge import MergeOptions, merge, plan_merge
from lora_kit.merging.report import Distance, MergePlan, MergeReport, NetworkError, WeightCheck
from lora_kit.merging.resize import Resized, resize
from lora_kit.merging.spectrum import UpdateSpectrum, spectrum

__all__ = [
    "Budget",
    "CombineOptions",
    "Combined",
    "Comparison",
    "Distance",
    "ExtractOptions",
    "Extracted",
    "Inspection",
    "MergeOptions",
    "MergePlan",
    "MergeReport",
    "ModuleLoss",
    "ModulePair",
    "NetworkError",
    "OpenedAdapter",
    "Resized",
    "ScaledUpdate",
    "UpdateSpectrum",
    "WeightCheck",
    "combine",
    "compare_adapters",
    "extract",
    "inspect_file",
    "merge",
    "open_adapters",
    "plan_merge",
    "resize",
    "rounding_bound",
    "spectrum",
    "total_bias_delta",
    "total_delta",
    "total_loss",
]
