"""Base models: families, loading, pipelines."""

from lora_kit.models.bundle import Family, ModelBundle
from lora_kit.models.hashing import base_hash
from lora_kit.models.loading import load_bundle, skeleton
from lora_kit.models.pipeline import pipeline, scheduler_named

__all__ = ["Family", "ModelBundle", "base_hash", "load_bundle", "pipeline", "scheduler_named", "skeleton"]
