"""Fuse adapters into weights, and check the result."""

from lora_kit.merging.delta import ScaledUpdate, rounding_bound, total_bias_delta, total_delta
from lora_kit.merging.merge import MergeOptions, merge, plan_merge
from lora_kit.merging.report import Distance, MergePlan, MergeReport, NetworkError, WeightCheck

__all__ = [
    "Distance",
    "MergeOptions",
    "MergePlan",
    "MergeReport",
    "NetworkError",
    "ScaledUpdate",
    "WeightCheck",
    "merge",
    "plan_merge",
    "rounding_bound",
    "total_bias_delta",
    "total_delta",
]
