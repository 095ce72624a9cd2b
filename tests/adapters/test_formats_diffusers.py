from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_samples import bundle_of, random_state
from safetensors.torch import save_file

from lora_kit.adapters import LoraUpdate, read_adapter
from lora_kit.errors import AdapterFileError
from lora_kit.models import ModelBundle

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def bundle(tiny_sd1_folder: Path) -> ModelBundle:
    return bundle_of(tiny_sd1_folder)


@pytest.fixture(scope="module")
def update(bundle: ModelBundle) -> LoraUpdate:
    return random_state(bundle.components, wanted=lambda module: module.name == Q).updates[Q]


@pytest.mark.parametrize(("down", "up"), [("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_both_spellings_are_read(down: str, up: str, bundle: ModelBundle, update: LoraUpdate, tmp_path: Path) -> None:
    save_file({f"{Q}.{down}.weight": update.down, f"{Q}.{up}.weight": update.up}, tmp_path / "a.safetensors")
    got = read_adapter(tmp_path / "a.safetensors", bundle.components).updates[Q]
    assert torch.equal(got.down, update.down)
    assert torch.equal(got.up, update.up)
    assert got.alpha == update.down.shape[0]


@pytest.mark.parametrize(
    ("config", "alpha_over_rank"),
    [
        ({"unet.lora_alpha": 6}, 6 / 4),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"mid_block.*to_q": 10}}, 10 / 4),
        ({"unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / 4**0.5),
    ],
)
def test_alpha_is_read_from_the_header(
    config: dict[str, object], alpha_over_rank: float, bundle: ModelBundle, tmp_path: Path
) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    got = read_adapter(tmp_path / "a.safetensors", bundle.components).updates[Q]
    assert got.alpha / 4 == alpha_over_rank


def test_what_diffusers_itself_saves_is_read(bundle: ModelBundle, tiny_sd1_folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1_folder)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "conv1"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    layers = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=config.to_dict())
    updates = read_adapter(tmp_path / "pytorch_lora_weights.safetensors", bundle.components).updates
    assert len(updates) == len(layers) // 2
    assert {update.alpha for update in updates.values()} == {5.0}
    assert torch.equal(updates[Q].down, layers[f"{Q.removeprefix('unet.')}.lora_A.weight"])


def test_a_broken_header_is_told(bundle: ModelBundle, tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(AdapterFileError, match="lora_adapter_metadata is not JSON"):
        read_adapter(tmp_path / "a.safetensors", bundle.components)
