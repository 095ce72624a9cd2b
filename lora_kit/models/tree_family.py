"""Which family a base is of, by its modules alone: where no config is at hand. Imports neither torch nor diffusers."""

from __future__ import annotations

from collections.abc import Mapping

from lora_kit.models.family.family_names import PIPELINE_FAMILIES, family_name
from lora_kit.targeting import ModuleInfo

_PROJECTION = "unet.mid_block.attentions.0.proj_in"
_LDM_BERT = "text_encoder.model.embed_tokens"


def family_of_tree(modules: Mapping[str, ModuleInfo]) -> str | None:
    """`sd1`, `sd2` or their inpainting families, as `families.recognise` tells them by their configs: around their
    transformers SD1 has 1 × 1 convolutions and SD2 linear layers; LDM text-to-image by its text encoder. None for a
    network without such transformers."""
    if _LDM_BERT in modules:
        return PIPELINE_FAMILIES["LDMTextToImagePipeline"]
    projection = modules.get(_PROJECTION)
    if projection is None or projection.kind not in ("conv", "linear"):
        return None
    first, last = modules.get("unet.conv_in"), modules.get("unet.conv_out")
    channels = {} if first is None or last is None else {"in_channels": first.shape[1], "out_channels": last.shape[0]}
    return family_name({"use_linear_projection": projection.kind == "linear", **channels})
