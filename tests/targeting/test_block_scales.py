"""Strengths per module: globs in order, and the block numbering of sd-webui's strings."""

from __future__ import annotations

from typing import Any

import pytest
from ldm_reference import SD15, unet_shapes

from lora_kit.errors import RecipeError
from lora_kit.models.architecture import text_encoder_tree, unet_tree
from lora_kit.models.single_file.ldm_keys import claim, structure
from lora_kit.targeting.block_scales import BLOCKS_17, BLOCKS_26, ldm_block, module_scales

UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
}
NAMES = [module.name for module in [*unet_tree(UNET), *text_encoder_tree({"hidden_size": 768})]]


def test_blocks_are_the_ldm_rows_of_an_original_checkpoint():
    """Against the names of the LDM network itself (written from its constructor), through the checkpoint's claims."""
    keys = unet_shapes(SD15)
    form = structure(keys)
    rows = {"input_blocks": "IN", "output_blocks": "OUT"}
    seen: set[str] = set()
    for key in keys:
        row, index = key.removeprefix("model.diffusion_model.").split(".")[:2]
        expected = "M00" if row == "middle_block" else f"{rows[row]}{int(index):02}" if row in rows else None
        found = claim(key, form)
        assert found is not None
        assert ldm_block("unet." + found.names[0].rpartition(".")[0]) == expected, key
        seen.add(str(expected))
    assert seen == {*BLOCKS_26, "None"} - {"BASE"}


def test_17_numbers_are_base_and_the_blocks_with_attention():
    blocks = {ldm_block(name) for name in NAMES if ".attentions." in name}
    assert set(BLOCKS_17) == blocks | {"BASE"}
    assert len(BLOCKS_17) == 17
    assert len(BLOCKS_26) == 26


def test_a_26_number_string_gives_each_block_its_number():
    scales = module_scales(NAMES, 2.0, [",".join(str(number) for number in range(26))])
    assert scales["unet.conv_in"] == 2 * BLOCKS_26.index("IN00")
    assert scales["unet.down_blocks.1.attentions.0.proj_in"] == 2 * BLOCKS_26.index("IN04")
    assert scales["unet.down_blocks.2.downsamplers.0.conv"] == 2 * BLOCKS_26.index("IN09")
    assert scales["unet.up_blocks.0.upsamplers.0.conv"] == 2 * BLOCKS_26.index("OUT02")
    assert scales["unet.time_embedding.linear_1"] == 2
    assert {scale for name, scale in scales.items() if name.startswith("text_encoder")} == {0}


def test_17_numbers_leave_the_other_blocks_out():
    scales = module_scales(NAMES, 1.0, [",".join(["0.5"] * 17)])
    assert scales["unet.down_blocks.0.downsamplers.0.conv"] == 0
    assert scales["unet.up_blocks.3.resnets.2.conv1"] == 0.5


def test_the_last_match_decides():
    specs = ["unet.**=0.5", "unet.up_blocks.**=0.6", "unet.up_blocks.1.**=-2"]
    scales = module_scales(NAMES, 0.5, specs)
    assert scales["unet.conv_in"] == 0.25
    assert scales["unet.up_blocks.3.attentions.0.proj_in"] == 0.3
    assert scales["unet.up_blocks.1.attentions.0.proj_in"] == -1
    assert all(scale == 0.5 for name, scale in scales.items() if name.startswith("text_encoder"))


def test_either_spelling_of_the_text_encoder_is_read():
    scales = module_scales(["text_encoder.encoder.layers.0.mlp.fc1"], 1.0, ["text_encoder.text_model.**=0.25"])
    assert list(scales.values()) == [0.25]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unet.up_block.**=0.6", "matches no adapted module.*\n.*unet.up_blocks"),
        ("unet.{mid_block,midblock}.**=0.6", "`midblock` of its braces"),
        ("unet.**=much", "PATTERN=NUMBER"),
        ("unet.**=nan", "PATTERN=NUMBER"),
        ("=1", "PATTERN=NUMBER"),
        ("unet.**", "PATTERN=NUMBER"),
        ("unet.a..b=1", "empty name"),
        ("1,0,1", "got 3 numbers"),
        (",".join(["x"] + ["1"] * 16), "got 'x' in it"),
    ],
)
def test_what_cannot_be_meant_is_said(spec: str, message: str):
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        module_scales(NAMES, 1.0, [spec])


def test_everything_wrong_is_told_at_once():
    with pytest.raises(RecipeError, match=r"(?s)nowhere.*got 2 numbers"):
        module_scales(NAMES, 1.0, ["unet.nowhere=1", "1,2"])


def test_an_unet_of_another_depth_is_refused_by_block_strings():
    with pytest.raises(RecipeError, match="UNets of 4 levels"):
        module_scales(["unet.down_blocks.4.resnets.0.conv1"], 1.0, [",".join(["1"] * 26)])
