from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from lora_kit.errors import ModelError
from lora_kit.models import loading, outline, skeleton
from lora_kit.models.architecture import UnknownArchitectureError, text_encoder_tree, unet_tree, vae_tree
from lora_kit.models.outline import Outline, read_outline
from lora_kit.recipe import ModelSection
from lora_kit.targeting import module_tree

UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "one layer a block": {"cross_attention_dim": 160, "block_out_channels": (48, 96, 144, 144), "norm_num_groups": 8}
    | {"layers_per_block": 1},
    "three layers, two levels": {
        "cross_attention_dim": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 3,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}


@pytest.mark.parametrize("name", UNETS)
def test_unet_tree_is_the_real_networks(name: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    assert unet_tree(unet.config) == module_tree({"unet": unet})


@pytest.mark.parametrize(("widths", "layers"), [((128, 256, 512, 512), 2), ((32, 64, 96), 1)])
def test_vae_tree_is_the_real_networks(widths: tuple[int, ...], layers: int) -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=widths,
            layers_per_block=layers,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
        )
    assert vae_tree(vae.config) == module_tree({"vae": vae})


def test_text_encoder_tree_is_the_real_networks() -> None:
    config = CLIPTextConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    with torch.device("meta"):
        expected = module_tree({"text_encoder": CLIPTextModel(config)})
    assert text_encoder_tree(config.to_dict()) == expected


def test_defaults_that_a_text_config_leaves_out() -> None:
    assert text_encoder_tree({}) == text_encoder_tree(CLIPTextConfig().to_dict())


@pytest.mark.parametrize(
    "change",
    [{"addition_embed_type": "text_time"}, {"transformer_layers_per_block": (1, 2)}, {"class_embed_type": "x"}],
)
def test_other_architectures_are_not_guessed(change: dict[str, Any]) -> None:
    with torch.device("meta"):
        config = dict(UNet2DConditionModel(**UNETS["sd1"]).config)
    with pytest.raises(UnknownArchitectureError):
        unet_tree(config | change)


def _from_skeleton(section: ModelSection) -> Outline:
    bundle = skeleton(section)
    networks = {**bundle.components, "vae": bundle.vae}
    sizes = {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}
    return Outline(module_tree(bundle.components), sizes, bundle.prediction_type, 1000, bundle.family.name)


@pytest.fixture
def no_skeleton(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a fall back to diffusers is a failure."""

    def refuse(section: ModelSection) -> Outline:
        raise AssertionError(f"{section.base} was not described from its config")

    monkeypatch.setattr(outline, "_built", refuse)


@pytest.mark.usefixtures("no_skeleton")
@pytest.mark.parametrize("folder", ["tiny_sd1_folder", "tiny_sd2_folder", "tiny_inpainting_folder"])
def test_outline_of_a_folder_is_the_skeletons(folder: str, request: pytest.FixtureRequest) -> None:
    section = ModelSection(base=str(request.getfixturevalue(folder)))
    assert read_outline(section) == _from_skeleton(section)


def test_errors_are_the_skeletons(tmp_path: Path) -> None:
    save_file({"x.lora_down.weight": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    for base in (tmp_path, tmp_path / "missing", tmp_path / "adapter.safetensors"):
        section = ModelSection(base=str(base))
        with pytest.raises(ModelError) as expected:
            skeleton(section)
        with pytest.raises(ModelError) as caught:
            read_outline(section)
        assert str(caught.value) == str(expected.value)


def test_tiny_is_the_same_folder_everywhere() -> None:
    assert outline.TINY_FOLDER == loading.TINY_FOLDER
