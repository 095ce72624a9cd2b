"""Configs of the diffusers networks, from the shapes in a single-file checkpoint and what v1 and v2 have in common.

What shapes tell (widths, levels, layers, where attention is) is read from them. What they cannot tell is a fact
of the published configs, `v1-inference.yaml` and `v2-inference(-v).yaml`: the number of heads, of norm groups,
activations, the noise schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_kit.models.single_file.ldm_keys import CLIP, OPEN_CLIP, UNET, VAE, Structure

Shapes = Mapping[str, tuple[int, ...]]

NORM_GROUPS = 32
SCALING_FACTOR = 0.18215
V1_HEADS = 8
V2_HEAD_WIDTH = 64
CLIP_HEAD_WIDTH = 64  # of every OpenAI and OpenCLIP text tower

SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def is_v2(shapes: Shapes) -> bool:
    """Whether the text encoder is OpenCLIP's, as in SD 2.x."""
    return any(name.startswith(OPEN_CLIP) for name in shapes)


def unet_config(shapes: Shapes, form: Structure) -> dict[str, Any]:
    """Config of the UNet2DConditionModel."""
    stride = form.unet_layers + 1
    levels = range(form.unet_levels)
    widths = tuple(shapes[f"{UNET}input_blocks.{1 + level * stride}.0.out_layers.3.weight"][0] for level in levels)
    attends = [f"{UNET}input_blocks.{1 + level * stride}.1.proj_in.weight" in shapes for level in levels]
    # Some files of SD2 hold its linear layers as 1 × 1 convolutions: then the text encoder tells.
    linear = is_v2(shapes) or len(shapes[f"{UNET}middle_block.1.proj_in.weight"]) == 2
    return {
        "sample_size": 64,
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": form.unet_layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        "cross_attention_dim": shapes[f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": linear,
        # Named so by mistake, long ago: for this class it is the number of heads.
        "attention_head_dim": tuple(max(width // V2_HEAD_WIDTH, 1) for width in widths) if linear else V1_HEADS,
        "norm_num_groups": NORM_GROUPS,
    }


def vae_config(shapes: Shapes, form: Structure, scaling_factor: float) -> dict[str, Any]:
    """Config of the AutoencoderKL."""
    levels = range(form.vae_levels)
    widths = tuple(shapes[f"{VAE}encoder.down.{level}.block.0.conv2.weight"][0] for level in levels)
    layers = sum(f"{VAE}encoder.down.0.block.{index}.conv1.weight" in shapes for index in range(16))
    return {
        "in_channels": shapes[f"{VAE}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{VAE}decoder.conv_out.weight"][0],
        "latent_channels": shapes[f"{VAE}post_quant_conv.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "norm_num_groups": NORM_GROUPS,
        "sample_size": 512,
        "scaling_factor": scaling_factor,
    }


def text_config(shapes: Shapes, form: Structure) -> dict[str, Any]:
    """Config of the CLIPTextModel. Start and end are the vocabulary's last two tokens, as in CLIP's tokenizer."""
    if is_v2(shapes):
        table, positions = f"{OPEN_CLIP}token_embedding.weight", f"{OPEN_CLIP}positional_embedding"
        middle = f"{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight"
    else:
        inner = "text_model." if any(name.startswith(f"{CLIP}text_model.") for name in shapes) else ""
        table = f"{CLIP}{inner}embeddings.token_embedding.weight"
        positions = f"{CLIP}{inner}embeddings.position_embedding.weight"
        middle = f"{CLIP}{inner}encoder.layers.0.mlp.fc1.weight"
    vocabulary, width = shapes[table]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[middle][0],
        "num_hidden_layers": form.text_layers,
        "num_attention_heads": max(width // CLIP_HEAD_WIDTH, 1),
        "max_position_embeddings": shapes[positions][0],
        "hidden_act": "gelu" if is_v2(shapes) else "quick_gelu",
        "projection_dim": 512 if is_v2(shapes) else width,
        "pad_token_id": 0 if is_v2(shapes) else vocabulary - 1,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
