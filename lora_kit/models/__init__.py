"""Base models: families, loading, pipelines.

Names are imported when they are first used (PEP 562): `outline` needs neither torch nor diffusers, whose import takes
longer than a plan may.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
