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


ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
PROCESSOR_KEYS = {
    # what a file of 2023 says → the module
    f"unet.{ATTENTION}.processor.to_q_lora": f"unet.{ATTENTION}.to_q",
    f"unet.{ATTENTION}.processor.to_out_lora": f"unet.{ATTENTION}.to_out.0",
    f"{ATTENTION}.processor.to_v_lora": f"unet.{ATTENTION}.to_v",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora": "text_encoder.encoder.layers.0.self_attn.q_proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora": (
        "text_encoder.encoder.layers.0.self_attn.out_proj"
    ),
    "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer": (
        "text_encoder.encoder.layers.0.self_attn.k_proj"
    ),
}


def test_attention_processor_keys_are_read(bundle: ModelBundle, tmp_path: Path) -> None:
    state = random_state(bundle.components)
    tensors = {}
    for spelling, name in PROCESSOR_KEYS.items():
        tensors[f"{spelling}.down.weight"] = state.updates[name].parts()["down"]
        tensors[f"{spelling}.up.weight"] = state.updates[name].parts()["up"]
    save_file(tensors, tmp_path / "a.safetensors")
    got = read_adapter(tmp_path / "a.safetensors", bundle.components).updates
    assert set(got) == set(PROCESSOR_KEYS.values())
    for name, update in got.items():
        assert torch.equal(update.parts()["up"], state.updates[name].parts()["up"])


def test_attention_processor_files_do_what_diffusers_makes_of_them(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    from library_outputs import assert_same, outputs_by_weight, outputs_of_diffusers

    components = bundle_of(tiny_sd1_folder).components
    tensors = {}
    for name, update in random_state(components, wanted=lambda module: ".attn" in module.name).updates.items():
        layer = name.rpartition("attn")[2][2:].removesuffix(".0")
        spelling = f"{name.rpartition('.to_')[0]}.processor.{layer}_lora"
        tensors |= {f"{spelling}.{part}.weight": tensor for part, tensor in update.parts().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    state = read_adapter(tmp_path / "a.safetensors", components)
    assert len(state.updates) == len(tensors) // 2
    assert_same(
        outputs_of_diffusers(tiny_sd1_folder, tmp_path / "a.safetensors"), outputs_by_weight(tiny_sd1_folder, state)
    )


def test_the_unet_alone_as_save_lora_adapter_writes_it(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel.from_pretrained(tiny_sd1_folder / "unet")
    unet.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["to_q"], init_lora_weights=False))
    unet.save_lora_adapter(tmp_path)
    got = read_adapter(tmp_path / "pytorch_lora_weights.safetensors", bundle_of(tiny_sd1_folder).components).updates
    weight = unet.get_submodule(Q.removeprefix("unet.")).lora_B["default"].weight
    assert torch.equal(got[Q].parts()["up"], weight)
    assert {update.alpha for update in got.values()} == {5.0}


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (f"{Q}.lora_B.bias", "trained biases"),
        (f"{Q}.lora_E", "unknown key"),
        (f"{ATTENTION}.processor.add_k_proj_lora.down.weight", "no such module"),
        ("unet." + "a." * 200 + "lora_A.weight", "unknown key"),
    ],
)
def test_what_is_more_than_lora_is_told(key: str, what: str, bundle: ModelBundle, tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 4), key: torch.ones(4)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=what):
        read_adapter(tmp_path / "a.safetensors", bundle.components)
