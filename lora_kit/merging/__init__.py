"""Fuse adapters into weights, and check the result."""

from lora_kit.merging.delta import ScaledUpdate, rounding_bound, total_bias_delta, total_delta
from lora_kit.merging.merge import MergeOptions, merge, plan_merge
from lora_kit.merging.report import Distance, MergePlan, MergeReport, NetworkError, WeightCheck
from lora_kit.merging.spectrum import UpdateSpectrum, spectra, spectrum

__all__ = [
    "Distance",
    "MergeOptions",
    "MergePlan",
    "MergeReport",
    "NetworkError",
    "ScaledUpdate",
    "UpdateSpectrum",
    "WeightCheck",
    "merge",
    "plan_merge",
    "rounding_bound",
    "spectra",
    "spectrum",
    "total_bias_delta",
    "total_delta",
]
