"""Module trees of the published bases, for reading an adapter's names without a base at hand.

Sources: the config.json files of stable-diffusion-v1-5 and stable-diffusion-2-1 (and the 9-channel inpainting ones),
and those that diffusers' convert_from_ckpt.py makes of CompVis' txt2img-1p4B-eval.yaml (ldm-text2im-large-256); the
network of latent-diffusion's models/ldm/bsr_sr/config.yaml (ldm-super-resolution-4x-openimages).
Imports neither torch nor diffusers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from lora_kit.models.architecture import text_encoder_tree, unet_tree
from lora_kit.models.ldm_bert_tree import ldm_bert_tree
from lora_kit.models.outline import read_outline
from lora_kit.models.plain_unet_tree import plain_unet_tree
from lora_kit.recipe.sections import ModelSection
from lora_kit.targeting import ModuleInfo

_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd1": (
        {"cross_attention_dim": 768, "use_linear_projection": False},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    ),
    "sd2": (
        {"cross_attention_dim": 1024, "use_linear_projection": True},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23},
    ),
}
"""Family → what its UNet's and its text encoder's published configs add to what both families share."""
_INPAINTING = {"in_channels": 9}

_SUPER_RESOLUTION: dict[str, Any] = {
    "in_channels": 6,
    "out_channels": 3,
    "block_out_channels": (160, 320, 320, 640),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D",) * 3 + ("AttnDownBlock2D",),
    "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
}
SUPER_RESOLUTION = "ldm_super_resolution"
_LDM_TEXT2IM = {"cross_attention_dim": 1280}
LDM_TEXT2IM = "ldm_text2im"
KNOWN_FAMILIES = tuple(_FAMILIES)


def known_tree(family: str) -> list[ModuleInfo]:
    """UNet and text encoder of `sd1` or `sd2`, as `module_tree` gives them."""
    return _tree(family, {})


@cache
def known_trees() -> dict[str, tuple[ModuleInfo, ...]]:
    """Name of a base → its `known_tree`; inpainting, `tiny` and the two LDM models too; the commonest first."""
    plain = {family: tuple(known_tree(family)) for family in KNOWN_FAMILIES}
    inpainting = {f"{family}-inpainting": tuple(_tree(family, _INPAINTING)) for family in KNOWN_FAMILIES}
    tiny = {"tiny": tuple(read_outline(ModelSection(base="tiny")).tree)}
    ldm = {LDM_TEXT2IM: (*unet_tree(_UNET | _LDM_TEXT2IM), *ldm_bert_tree({}))}
    return plain | inpainting | tiny | ldm | {SUPER_RESOLUTION: tuple(plain_unet_tree(_SUPER_RESOLUTION))}


def _tree(family: str, changes: dict[str, Any]) -> list[ModuleInfo]:
    unet, text = _FAMILIES[family]
    return [*unet_tree(_UNET | unet | changes), *text_encoder_tree(text)]
