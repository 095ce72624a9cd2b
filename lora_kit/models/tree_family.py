"""Which family a base is of, by its modules alone: where no config is at hand. Imports neither torch nor diffusers."""

from __future__ import annotations

from collections.abc import Mapping

from lora_kit.targeting import ModuleInfo

_PROJECTION = "unet.mid_block.attentions.0.proj_in"


def family_of_tree(modules: Mapping[str, ModuleInfo]) -> str | None:
    """`sd1` or `sd2`, as `families.recognise` tells them by their configs: around their transformers SD1 has 1 × 1
    convolutions and SD2 linear layers. None for a network without such transformers."""
    projection = modules.get(_PROJECTION)
    if projection is None or projection.kind not in ("conv", "linear"):
        return None
    return "sd2" if projection.kind == "linear" else "sd1"
