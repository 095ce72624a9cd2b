"""Which base an adapter's header says it is for."""

from __future__ import annotations

from collections.abc import Mapping


def family_of(metadata: Mapping[str, str]) -> str | None:
    """`sd1`, `sd2` or another family's name, as the header tells it; None if it does not."""
    if "lora_kit.family" in metadata:
        return metadata["lora_kit.family"]
    told = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture", "")
    for family, marks in {"sd1": ("sd_v1", "stable-diffusion-v1"), "sd2": ("sd_v2", "stable-diffusion-v2")}.items():
        if told.startswith(marks):
            return family
    return told or None
