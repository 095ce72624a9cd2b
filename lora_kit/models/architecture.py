"""Config → module tree without building the network: importing diffusers alone takes longer than a plan may.

Names, shapes and order are those of diffusers' UNet2DConditionModel and AutoencoderKL and transformers'
CLIPTextModel for Stable Diffusion v1 and v2; the tests compare them with the real networks on the meta device.
A config that says anything else raises UnknownArchitectureError, and the caller builds the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from lora_kit.targeting import ModuleInfo

Config = Mapping[str, Any]

CROSS_ATTENTION = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
_PLAIN_BLOCKS = ("DownBlock2D", "UpBlock2D", "DownEncoderBlock2D", "UpDecoderBlock2D")

_UNET_FIXED: dict[str, Any] = {
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "transformer_layers_per_block": 1,
    "cross_attention_norm": None,
}
"""Keys that would change the modules; any other value is not described here."""
_VAE_FIXED: dict[str, Any] = {"mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True}
_TEXT_DEFAULTS: dict[str, int] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
}
"""CLIPTextConfig's own; transformers leaves them out of config.json."""


class UnknownArchitectureError(Exception):
    """The config describes modules that this file does not know."""


def unet_tree(config: Config) -> list[ModuleInfo]:
    """The UNet2DConditionModel's modules, as `module_tree` gives them."""
    _check(config, _UNET_FIXED)
    return list(_unet(config))


def vae_tree(config: Config) -> list[ModuleInfo]:
    """The AutoencoderKL's modules."""
    _check(config, _VAE_FIXED)
    return list(_vae(config))


def text_encoder_tree(config: Config) -> list[ModuleInfo]:
    """The CLIPTextModel's modules, named as the installed transformers names them."""
    major, minor = (int(part) for part in version("transformers").split(".")[:2])
    inner = "text_encoder" if (major, minor) >= (5, 6) else "text_encoder.text_model"
    return list(_text_encoder(_TEXT_DEFAULTS | dict(config), inner))


def described_module(name: str, kind: str, *shape: int, bias: bool = True) -> ModuleInfo:
    """A module by its weight's shape, with as many biases as outputs if it has some."""
    return ModuleInfo(name, kind, shape, math.prod(shape) + (shape[0] if bias else 0))


def _check(config: Config, fixed: Config) -> None:
    blocks = {*config["down_block_types"], *config["up_block_types"]}
    if blocks - {*CROSS_ATTENTION, *_PLAIN_BLOCKS} or any(
        config.get(key, value) != value for key, value in fixed.items()
    ):
        raise UnknownArchitectureError
    if not isinstance(config["layers_per_block"], int) or not isinstance(config.get("cross_attention_dim", 0), int):
        raise UnknownArchitectureError


def _unet(config: Config) -> Iterator[ModuleInfo]:
    widths: Sequence[int] = config["block_out_channels"]
    layers: int = config["layers_per_block"]
    narrow, wide = widths[0], widths[-1]
    time = 4 * narrow
    yield described_module("unet.conv_in", "conv", narrow, config["in_channels"], 3, 3)
    yield described_module("unet.time_embedding.linear_1", "linear", time, narrow)
    yield described_module("unet.time_embedding.linear_2", "linear", time, time)
    for level, width in enumerate(widths):
        name = f"unet.down_blocks.{level}"
        inputs = [widths[max(level - 1, 0)], *[width] * (layers - 1)]
        if config["down_block_types"][level] in CROSS_ATTENTION:
            yield from _attentions(name, layers, width, config)
        yield from resnets(name, inputs, width, time)
        if level < len(widths) - 1:
            yield described_module(f"{name}.downsamplers.0.conv", "conv", width, width, 3, 3)
    for level, width in enumerate(reversed(widths)):
        name = f"unet.up_blocks.{level}"
        if config["up_block_types"][level] in CROSS_ATTENTION:
            yield from _attentions(name, layers + 1, width, config)
        yield from resnets(name, up_inputs(widths, level, layers), width, time)
        if level < len(widths) - 1:
            yield described_module(f"{name}.upsamplers.0.conv", "conv", width, width, 3, 3)
    yield from _attentions("unet.mid_block", 1, wide, config)
    yield from resnets("unet.mid_block", [wide, wide], wide, time)
    yield described_module("unet.conv_norm_out", "other", narrow)
    yield described_module("unet.conv_out", "conv", config["out_channels"], narrow, 3, 3)


def up_inputs(widths: Sequence[int], level: int, layers: int) -> list[int]:
    """Input widths of the residual blocks at `level` of the up path, counted from the deepest.

    Each takes what comes from below beside one skip: the level's own width, but for the last skip, which left the
    down path a level higher.
    """
    from_deepest = list(reversed(widths))
    width, below = from_deepest[level], from_deepest[max(level - 1, 0)]
    above = from_deepest[min(level + 1, len(widths) - 1)]
    return [below + width, *[2 * width] * (layers - 1), width + above]


def resnets(name: str, inputs: Sequence[int], width: int, time: int | None) -> Iterator[ModuleInfo]:
    """Residual blocks of these input widths; time: the width of the time embedding, which a VAE has none of."""
    for index, inside in enumerate(inputs):
        block = f"{name}.resnets.{index}"
        yield described_module(f"{block}.norm1", "other", inside)
        yield described_module(f"{block}.conv1", "conv", width, inside, 3, 3)
        if time is not None:
            yield described_module(f"{block}.time_emb_proj", "linear", width, time)
        yield described_module(f"{block}.norm2", "other", width)
        yield described_module(f"{block}.conv2", "conv", width, width, 3, 3)
        if inside != width:
            yield described_module(f"{block}.conv_shortcut", "conv", width, inside, 1, 1)


def _attentions(name: str, count: int, width: int, config: Config) -> Iterator[ModuleInfo]:
    kind, window = ("linear", ()) if config.get("use_linear_projection", False) else ("conv", (1, 1))
    for index in range(count):
        transformer = f"{name}.attentions.{index}"
        yield described_module(f"{transformer}.norm", "other", width)
        yield described_module(f"{transformer}.proj_in", kind, width, width, *window)
        yield from _transformer_block(f"{transformer}.transformer_blocks.0", width, config["cross_attention_dim"])
        yield described_module(f"{transformer}.proj_out", kind, width, width, *window)


def _transformer_block(name: str, width: int, context: int) -> Iterator[ModuleInfo]:
    for number, inside in ((1, width), (2, context)):
        yield described_module(f"{name}.norm{number}", "other", width)
        yield described_module(f"{name}.attn{number}.to_q", "linear", width, width, bias=False)
        yield described_module(f"{name}.attn{number}.to_k", "linear", width, inside, bias=False)
        yield described_module(f"{name}.attn{number}.to_v", "linear", width, inside, bias=False)
        yield described_module(f"{name}.attn{number}.to_out.0", "linear", width, width)
    yield described_module(f"{name}.norm3", "other", width)
    yield described_module(f"{name}.ff.net.0.proj", "linear", 8 * width, width)  # GEGLU: 4 × width, and its gate
    yield described_module(f"{name}.ff.net.2", "linear", width, 4 * width)


def _vae(config: Config) -> Iterator[ModuleInfo]:
    widths: Sequence[int] = config["block_out_channels"]
    layers, latent = config["layers_per_block"], config["latent_channels"]
    wide = widths[-1]
    yield described_module("vae.encoder.conv_in", "conv", widths[0], config["in_channels"], 3, 3)
    for level, width in enumerate(widths):
        name = f"vae.encoder.down_blocks.{level}"
        yield from resnets(name, [widths[max(level - 1, 0)], *[width] * (layers - 1)], width, None)
        if level < len(widths) - 1:
            yield described_module(f"{name}.downsamplers.0.conv", "conv", width, width, 3, 3)
    yield from _vae_middle("vae.encoder", wide)
    yield described_module("vae.encoder.conv_norm_out", "other", wide)
    yield described_module("vae.encoder.conv_out", "conv", 2 * latent, wide, 3, 3)
    yield described_module("vae.decoder.conv_in", "conv", wide, latent, 3, 3)
    down = list(reversed(widths))
    for level, width in enumerate(down):
        name = f"vae.decoder.up_blocks.{level}"
        yield from resnets(name, [down[max(level - 1, 0)], *[width] * layers], width, None)
        if level < len(widths) - 1:
            yield described_module(f"{name}.upsamplers.0.conv", "conv", width, width, 3, 3)
    yield from _vae_middle("vae.decoder", wide)
    yield described_module("vae.decoder.conv_norm_out", "other", widths[0])
    yield described_module("vae.decoder.conv_out", "conv", config["out_channels"], widths[0], 3, 3)
    yield described_module("vae.quant_conv", "conv", 2 * latent, 2 * latent, 1, 1)
    yield described_module("vae.post_quant_conv", "conv", latent, latent, 1, 1)


def _vae_middle(name: str, width: int) -> Iterator[ModuleInfo]:
    attention = f"{name}.mid_block.attentions.0"
    yield described_module(f"{attention}.group_norm", "other", width)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        yield described_module(f"{attention}.{part}", "linear", width, width)
    yield from resnets(f"{name}.mid_block", [width, width], width, None)


def _text_encoder(config: Config, name: str) -> Iterator[ModuleInfo]:
    width, middle = config["hidden_size"], config["intermediate_size"]
    embeddings = f"{name}.embeddings"
    yield described_module(f"{embeddings}.token_embedding", "other", config["vocab_size"], width, bias=False)
    positions = config["max_position_embeddings"]
    yield described_module(f"{embeddings}.position_embedding", "other", positions, width, bias=False)
    for index in range(config["num_hidden_layers"]):
        layer = f"{name}.encoder.layers.{index}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield described_module(f"{layer}.self_attn.{part}", "linear", width, width)
        yield described_module(f"{layer}.layer_norm1", "other", width)
        yield described_module(f"{layer}.mlp.fc1", "linear", middle, width)
        yield described_module(f"{layer}.mlp.fc2", "linear", width, middle)
        yield described_module(f"{layer}.layer_norm2", "other", width)
    yield described_module(f"{name}.final_layer_norm", "other", width)
