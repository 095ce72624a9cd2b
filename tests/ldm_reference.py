"""Single-file checkpoints for the tests, laid out as the LDM networks register their parameters.

Written from the constructors of CompVis' `UNetModel`, `Encoder`, `Decoder`, of CLIP and of OpenCLIP, so that
it knows nothing of the mapping under test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Shapes = dict[str, tuple[int, ...]]


class Size(NamedTuple):
    version: int
    width: int
    multipliers: tuple[int, ...]
    attention_levels: tuple[int, ...]
    layers: int
    text_width: int
    text_layers: int
    vocabulary: int
    vae_width: int
    vae_multipliers: tuple[int, ...]
    vae_layers: int
    in_channels: int = 4


SD15 = Size(1, 320, (1, 2, 4, 4), (0, 1, 2), 2, 768, 12, 49408, 128, (1, 2, 4, 4), 2)
SD21 = Size(2, 320, (1, 2, 4, 4), (0, 1, 2), 2, 1024, 24, 49408, 128, (1, 2, 4, 4), 2)


def small(version: int, vocabulary: int) -> Size:
    """The smallest networks that 32 norm groups and 64-wide heads allow."""
    return Size(version, 32 * version, (1, 2), (0,), 1, 64, 2 + version - 1, vocabulary, 32, (1, 2), 1)


def _layer(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _resnet(name: str, inputs: int, outputs: int, embedding: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _layer(f"{name}.in_layers.0", inputs)
    yield from _layer(f"{name}.in_layers.2", outputs, inputs, 3, 3)
    yield from _layer(f"{name}.emb_layers.1", outputs, embedding)
    yield from _layer(f"{name}.out_layers.0", outputs)
    yield from _layer(f"{name}.out_layers.3", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _layer(f"{name}.skip_connection", outputs, inputs, 1, 1)


def _transformer(name: str, width: int, context: int, linear: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    projection = (width, width) if linear else (width, width, 1, 1)
    block = f"{name}.transformer_blocks.0"
    yield from _layer(f"{name}.norm", width)
    yield from _layer(f"{name}.proj_in", *projection)
    for attention, keys in (("attn1", width), ("attn2", context)):
        yield f"{block}.{attention}.to_q.weight", (width, width)
        yield f"{block}.{attention}.to_k.weight", (width, keys)
        yield f"{block}.{attention}.to_v.weight", (width, keys)
        yield from _layer(f"{block}.{attention}.to_out.0", width, width)
    yield from _layer(f"{block}.ff.net.0.proj", 8 * width, width)
    yield from _layer(f"{block}.ff.net.2", width, 4 * width)
    for norm in ("norm1", "norm2", "norm3"):
        yield from _layer(f"{block}.{norm}", width)
    yield from _layer(f"{name}.proj_out", *projection)


def unet_shapes(size: Size) -> Shapes:
    """Parameters of `UNetModel(model_channels=width, channel_mult=multipliers, num_res_blocks=layers, …)`."""
    shapes: Shapes = {}
    width, embedding, linear = size.width, 4 * size.width, size.version == 2
    shapes.update(_layer("time_embed.0", embedding, width))
    shapes.update(_layer("time_embed.2", embedding, embedding))
    shapes.update(_layer("input_blocks.0.0", width, size.in_channels, 3, 3))
    channels, skips, index = width, [width], 1
    for level, multiplier in enumerate(size.multipliers):
        for _ in range(size.layers):
            shapes.update(_resnet(f"input_blocks.{index}.0", channels, multiplier * width, embedding))
            channels = multiplier * width
            if level in size.attention_levels:
                shapes.update(_transformer(f"input_blocks.{index}.1", channels, size.text_width, linear))
            skips.append(channels)
            index += 1
        if level + 1 < len(size.multipliers):
            shapes.update(_layer(f"input_blocks.{index}.0.op", channels, channels, 3, 3))
            skips.append(channels)
            index += 1
    shapes.update(_resnet("middle_block.0", channels, channels, embedding))
    shapes.update(_transformer("middle_block.1", channels, size.text_width, linear))
    shapes.update(_resnet("middle_block.2", channels, channels, embedding))
    index = 0
    for level, multiplier in reversed(list(enumerate(size.multipliers))):
        for layer in range(size.layers + 1):
            shapes.update(_resnet(f"output_blocks.{index}.0", channels + skips.pop(), multiplier * width, embedding))
            channels, slot = multiplier * width, 1
            if level in size.attention_levels:
                shapes.update(_transformer(f"output_blocks.{index}.1", channels, size.text_width, linear))
                slot = 2
            if level and layer == size.layers:
                shapes.update(_layer(f"output_blocks.{index}.{slot}.conv", channels, channels, 3, 3))
            index += 1
    shapes.update(_layer("out.0", channels))
    shapes.update(_layer("out.2", 4, channels, 3, 3))
    return {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}


def _vae_resnet(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _layer(f"{name}.norm1", inputs)
    yield from _layer(f"{name}.conv1", outputs, inputs, 3, 3)
    yield from _layer(f"{name}.norm2", outputs)
    yield from _layer(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1)


def _vae_middle(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _vae_resnet(f"{name}.block_1", width, width)
    yield from _layer(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _layer(f"{name}.attn_1.{part}", width, width, 1, 1)
    yield from _vae_resnet(f"{name}.block_2", width, width)


def vae_shapes(size: Size) -> Shapes:
    """Parameters of `AutoencoderKL(ch=vae_width, ch_mult=vae_multipliers, num_res_blocks=vae_layers)`."""
    shapes: Shapes = {}
    widths = [size.vae_width * multiplier for multiplier in size.vae_multipliers]
    shapes.update(_layer("encoder.conv_in", widths[0], 3, 3, 3))
    channels = widths[0]
    for level, width in enumerate(widths):
        for layer in range(size.vae_layers):
            shapes.update(_vae_resnet(f"encoder.down.{level}.block.{layer}", channels, width))
            channels = width
        if level + 1 < len(widths):
            shapes.update(_layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3))
    shapes.update(_vae_middle("encoder.mid", channels))
    shapes.update(_layer("encoder.norm_out", channels))
    shapes.update(_layer("encoder.conv_out", 8, channels, 3, 3))
    shapes.update(_layer("decoder.conv_in", channels, 4, 3, 3))
    shapes.update(_vae_middle("decoder.mid", channels))
    for level, width in reversed(list(enumerate(widths))):
        for layer in range(size.vae_layers + 1):
            shapes.update(_vae_resnet(f"decoder.up.{level}.block.{layer}", channels, width))
            channels = width
        if level:
            shapes.update(_layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3))
    shapes.update(_layer("decoder.norm_out", channels))
    shapes.update(_layer("decoder.conv_out", 3, channels, 3, 3))
    shapes.update(_layer("quant_conv", 8, 8, 1, 1))
    shapes.update(_layer("post_quant_conv", 4, 4, 1, 1))
    return {f"first_stage_model.{name}": shape for name, shape in shapes.items()}


def clip_shapes(size: Size) -> Shapes:
    """Parameters of transformers' CLIPTextModel as of 2022, inside FrozenCLIPEmbedder."""
    width, shapes = size.text_width, dict[str, tuple[int, ...]]()
    shapes["embeddings.position_ids"] = (1, 77)
    shapes["embeddings.token_embedding.weight"] = (size.vocabulary, width)
    shapes["embeddings.position_embedding.weight"] = (77, width)
    for index in range(size.text_layers):
        layer = f"encoder.layers.{index}"
        for part in ("k", "v", "q", "out"):
            shapes.update(_layer(f"{layer}.self_attn.{part}_proj", width, width))
        shapes.update(_layer(f"{layer}.layer_norm1", width))
        shapes.update(_layer(f"{layer}.mlp.fc1", 4 * width, width))
        shapes.update(_layer(f"{layer}.mlp.fc2", width, 4 * width))
        shapes.update(_layer(f"{layer}.layer_norm2", width))
    shapes.update(_layer("final_layer_norm", width))
    return {f"cond_stage_model.transformer.text_model.{name}": shape for name, shape in shapes.items()}


def open_clip_shapes(size: Size) -> Shapes:
    """Parameters of OpenCLIP's text tower inside FrozenOpenCLIPEmbedder."""
    width, shapes = size.text_width, dict[str, tuple[int, ...]]()
    shapes["positional_embedding"] = (77, width)
    shapes["text_projection"] = (width, width)
    shapes["logit_scale"] = ()
    shapes["attn_mask"] = (77, 77)
    shapes["token_embedding.weight"] = (size.vocabulary, width)
    for index in range(size.text_layers):
        block = f"transformer.resblocks.{index}"
        shapes.update(_layer(f"{block}.ln_1", width))
        shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
        shapes.update(_layer(f"{block}.attn.out_proj", width, width))
        shapes.update(_layer(f"{block}.ln_2", width))
        shapes.update(_layer(f"{block}.mlp.c_fc", 4 * width, width))
        shapes.update(_layer(f"{block}.mlp.c_proj", width, 4 * width))
    shapes.update(_layer("ln_final", width))
    return {f"cond_stage_model.model.{name}": shape for name, shape in shapes.items()}


def checkpoint_shapes(size: Size) -> Shapes:
    """Every tensor of a pruned release file, and some of the buffers that come along."""
    schedule = {"betas": (1000,), "alphas_cumprod": (1000,), "sqrt_one_minus_alphas_cumprod": (1000,)}
    text = open_clip_shapes(size) if size.version == 2 else clip_shapes(size)
    return {**schedule, **unet_shapes(size), **vae_shapes(size), **text}
