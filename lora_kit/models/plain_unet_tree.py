"""Config → module tree of diffusers' UNet2DModel, which reads no text. As `architecture`, which it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_kit.models.architecture import UnknownArchitectureError, described_module, resnets, up_inputs
from lora_kit.targeting import ModuleInfo

Config = Mapping[str, Any]

_WITH_ATTENTION = ("AttnDownBlock2D", "AttnUpBlock2D")
_BLOCKS = (*_WITH_ATTENTION, "DownBlock2D", "UpBlock2D")
_FIXED: dict[str, Any] = {
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D",
    "downsample_type": "conv",
    "upsample_type": "conv",
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "attn_norm_num_groups": None,
    "class_embed_type": None,
    "num_class_embeds": None,
}
"""Keys that would change the modules; any other value is not described here."""


def plain_unet_tree(config: Config) -> list[ModuleInfo]:
    """The UNet2DModel's modules, as `module_tree` gives them. Raises UnknownArchitectureError for another one's
    config."""
    blocks = {*config["down_block_types"], *config["up_block_types"]}
    if blocks - set(_BLOCKS) or any(config.get(key, value) != value for key, value in _FIXED.items()):
        raise UnknownArchitectureError
    return list(_unet(config))


def _unet(config: Config) -> Iterator[ModuleInfo]:
    widths: Sequence[int] = config["block_out_channels"]
    layers: int = config.get("layers_per_block", 2)
    narrow, last = widths[0], len(widths) - 1
    time = 4 * narrow
    yield described_module("unet.conv_in", "conv", narrow, config["in_channels"], 3, 3)
    yield described_module("unet.time_embedding.linear_1", "linear", time, narrow)
    yield described_module("unet.time_embedding.linear_2", "linear", time, time)
    for level, width in enumerate(widths):
        name = f"unet.down_blocks.{level}"
        if config["down_block_types"][level] in _WITH_ATTENTION:
            yield from _attentions(name, layers, width)
        yield from resnets(name, [widths[max(level - 1, 0)], *[width] * (layers - 1)], width, time)
        if level < last:
            yield described_module(f"{name}.downsamplers.0.conv", "conv", width, width, 3, 3)
    for level, width in enumerate(reversed(widths)):
        name = f"unet.up_blocks.{level}"
        if config["up_block_types"][level] in _WITH_ATTENTION:
            yield from _attentions(name, layers + 1, width)
        yield from resnets(name, up_inputs(widths, level, layers), width, time)
        if level < last:
            yield described_module(f"{name}.upsamplers.0.conv", "conv", width, width, 3, 3)
    yield from _attentions("unet.mid_block", 1, widths[-1])
    yield from resnets("unet.mid_block", [widths[-1]] * 2, widths[-1], time)
    yield described_module("unet.conv_norm_out", "other", narrow)
    yield described_module("unet.conv_out", "conv", config["out_channels"], narrow, 3, 3)


def _attentions(name: str, count: int, width: int) -> Iterator[ModuleInfo]:
    for index in range(count):
        attention = f"{name}.attentions.{index}"
        yield described_module(f"{attention}.group_norm", "other", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            yield described_module(f"{attention}.{part}", "linear", width, width)
