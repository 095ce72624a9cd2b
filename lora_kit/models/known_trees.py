"""Module trees of the published Stable Diffusion networks: what adapters are read against where no base is named.

Sources: the config.json files of stable-diffusion-v1-5 and stable-diffusion-2-1 (and the 9-channel inpainting ones).
Imports neither torch nor diffusers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from lora_kit.models.architecture import text_encoder_tree, unet_tree
from lora_kit.models.outline import read_outline
from lora_kit.recipe.sections import ModelSection
from lora_kit.targeting import ModuleInfo

_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
_SD1 = {"cross_attention_dim": 768}
_SD2 = {"cross_attention_dim": 1024, "use_linear_projection": True}
_TEXT1 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_TEXT2 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
_INPAINTING = {"in_channels": 9}


@cache
def known_trees() -> dict[str, tuple[ModuleInfo, ...]]:
    """Name of a base → the modules of its UNet and text encoder, under dotted names; the commonest base first."""
    trees = {
        "sd1": (*unet_tree(_UNET | _SD1), *text_encoder_tree(_TEXT1)),
        "sd2": (*unet_tree(_UNET | _SD2), *text_encoder_tree(_TEXT2)),
        "sd1 inpainting": (*unet_tree(_UNET | _SD1 | _INPAINTING), *text_encoder_tree(_TEXT1)),
        "sd2 inpainting": (*unet_tree(_UNET | _SD2 | _INPAINTING), *text_encoder_tree(_TEXT2)),
    }
    return trees | {"tiny": tuple(read_outline(ModelSection(base="tiny")).tree)}
