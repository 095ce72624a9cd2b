from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lora_kit.targeting import ModuleInfo, module_tree


def _tree(width: int, heads: int | Sequence[int], linear: bool, layers: int) -> list[ModuleInfo]:
    """Stable Diffusion's published sizes, on the meta device."""
    text = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=width,
            attention_head_dim=heads,  # pyright: ignore[reportArgumentType] - diffusers' own hint lacks sequences
            use_linear_projection=linear,
        )
        return module_tree({"unet": unet, "text_encoder": CLIPTextModel(text)})


@pytest.fixture(scope="session")
def sd1_tree() -> list[ModuleInfo]:
    return _tree(768, 8, linear=False, layers=12)


@pytest.fixture(scope="session")
def sd2_tree() -> list[ModuleInfo]:
    return _tree(1024, (5, 10, 20, 20), linear=True, layers=23)


@pytest.fixture
def small_tree() -> list[ModuleInfo]:
    """Two attention layers, a residual block and a norm, and a text encoder's layer."""
    layers = {
        "unet.conv_in": ("conv", (8, 4, 3, 3)),
        "unet.down.0.attn1.to_q": ("linear", (8, 8)),
        "unet.down.0.attn1.to_k": ("linear", (8, 6)),
        "unet.down.0.attn1.to_out.0": ("linear", (8, 8)),
        "unet.down.0.norm": ("other", (8,)),
        "unet.mid.conv1": ("conv", (8, 8, 3, 3)),
        "unet.mid.conv2": ("conv", (8, 8, 1, 1)),
        "text_encoder.encoder.layers.0.mlp.fc1": ("linear", (32, 8)),
    }
    return [ModuleInfo(name, kind, shape, 100) for name, (kind, shape) in layers.items()]
