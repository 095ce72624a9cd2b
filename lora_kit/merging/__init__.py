"""Fuse adapters into weights, and check the result."""

from lora_kit.merging.delta import ScaledUpdate, rounding_bound, total_bias_delta, total_delta
from lora_kit.merging.folder import merge_folder
from lora_kit.merging.report import MergeReport, NetworkError, Verification, WeightCheck
from lora_kit.merging.spectrum import UpdateSpectrum, spectra, spectrum

__all__ = [
    "MergeReport",
    "NetworkError",
    "ScaledUpdate",
    "UpdateSpectrum",
    "Verification",
    "WeightCheck",
    "merge_folder",
    "rounding_bound",
    "spectra",
    "spectrum",
    "total_bias_delta",
    "total_delta",
]
