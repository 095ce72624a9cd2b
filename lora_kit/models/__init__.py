"""Base models: families, loading, pipelines.

Names are imported when they are first used (PEP 562): `outline` needs neither torch nor diffusers, whose import takes
longer than a plan may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kit.first_use import imported_on_first_use

if TYPE_CHECKING:
    from lora_kit.models.bundle import Family, ModelBundle
    from lora_kit.models.hashing import base_hash
    from lora_kit.models.loading import load_bundle, skeleton
    from lora_kit.models.pipelines import pipeline, scheduler_named

__all__ = ["Family", "ModelBundle", "base_hash", "load_bundle", "pipeline", "scheduler_named", "skeleton"]

_HOMES = {
    "Family": "bundle",
    "ModelBundle": "bundle",
    "base_hash": "hashing",
    "load_bundle": "loading",
    "pipeline": "pipelines",
    "scheduler_named": "pipelines",
    "skeleton": "loading",
}

__getattr__ = imported_on_first_use(__name__, _HOMES)
