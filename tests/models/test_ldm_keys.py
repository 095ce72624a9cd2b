from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from ldm_reference import SD15, SD21, Size, checkpoint_shapes
from transformers import CLIPTextConfig, CLIPTextModel

from lora_kit.models.single_file.ldm_configs import text_config, unet_config, vae_config
from lora_kit.models.single_file.ldm_keys import claim, is_unused, structure

# From the published configs of runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-2-1.
PUBLISHED = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
PUBLISHED_V1 = {**PUBLISHED, "cross_attention_dim": 768, "attention_head_dim": 8}
PUBLISHED_V2 = {
    **PUBLISHED,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TEXT_V1 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_V2 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}


def _networks(unet: dict, text: dict) -> dict[str, dict[str, torch.Size]]:
    """Component → name → shape, of the networks that diffusers builds from the published configs."""
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel(**unet),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        }
    return {
        component: {name.removeprefix("text_model."): tensor.shape for name, tensor in network.state_dict().items()}
        for component, network in networks.items()
    }


@pytest.mark.parametrize(
    ("size", "unet", "text"), [(SD15, PUBLISHED_V1, TEXT_V1), (SD21, PUBLISHED_V2, TEXT_V2)], ids=["sd15", "sd21"]
)
class TestRealSizes:
    def test_every_tensor_of_the_networks_is_claimed_exactly_once(self, size: Size, unet: dict, text: dict) -> None:
        shapes = checkpoint_shapes(size)
        form = structure(shapes)
        claims = [found for name in shapes if not is_unused(name, form) and (found := claim(name, form))]
        counted = Counter((found.component, name) for found in claims for name in found.names)
        wanted = {(part, name) for part, names in _networks(unet, text).items() for name in names}
        assert set(counted) == wanted
        assert set(counted.values()) == {1}

    def test_every_tensor_of_the_file_is_claimed_or_known_as_unused(self, size: Size, unet: dict, text: dict) -> None:
        shapes = checkpoint_shapes(size)
        form = structure(shapes)
        assert [name for name in shapes if (claim(name, form) is None) != is_unused(name, form)] == []

    def test_claimed_shapes_agree(self, size: Size, unet: dict, text: dict) -> None:
        shapes, networks = checkpoint_shapes(size), _networks(unet, text)
        form = structure(shapes)
        for name, shape in shapes.items():
            found = claim(name, form)
            if found is None:
                continue
            whole = [networks[found.component][target].numel() for target in found.names]
            assert sum(whole) == torch.Size(shape).numel(), name

    def test_configs_equal_the_published_ones(self, size: Size, unet: dict, text: dict) -> None:
        shapes = checkpoint_shapes(size)
        form = structure(shapes)
        found = unet_config(shapes, form)
        assert {key: found[key] for key in unet} == unet
        found = vae_config(shapes, form, 0.18215)
        assert {key: found[key] for key in VAE} == VAE
        found = text_config(shapes, form)
        assert {key: found[key] for key in text} == text


def test_an_open_clip_tower_written_without_its_unused_layer_has_all_its_layers_read() -> None:
    shapes = checkpoint_shapes(SD21._replace(text_layers=23))
    for name in ("text_projection", "logit_scale", "attn_mask"):
        del shapes[f"cond_stage_model.model.{name}"]
    assert structure(shapes).text_layers == 23


def test_names_of_other_networks_are_claimed_by_none() -> None:
    form = structure(checkpoint_shapes(SD15))
    for name in ("model.diffusion_model.label_emb.0.0.weight", "first_stage_model.encoder.down.0.attn.0.q.weight"):
        assert claim(name, form) is None
        assert not is_unused(name, form)
