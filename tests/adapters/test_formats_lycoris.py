"""Files that hold other methods than LoRA: mixed, in both networks, in both spellings, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_samples import bundle_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_kit.adapters import AdapterState, read_adapter, read_raw, write_kohya
from lora_kit.adapters.formats.lycoris import SUFFIXES
from lora_kit.adapters.updates import METHODS
from lora_kit.errors import AdapterFileError
from lora_kit.models import ModelBundle

BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
RESNET = "lora_unet_down_blocks_0_resnets_0"
TEXT = "lora_te_text_model_encoder_layers_0"
NAMES = {
    f"{BLOCK}_attn1_to_q": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "loha"),
    f"{BLOCK}_attn1_to_k": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k", "lora"),
    f"{BLOCK}_attn1_to_v": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v", "glora"),
    f"{BLOCK}_norm1": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.norm1", "norm"),
    f"{RESNET}_conv1": ("unet.down_blocks.0.resnets.0.conv1", "lokr"),
    f"{RESNET}_conv2": ("unet.down_blocks.0.resnets.0.conv2", "oft"),
    f"{RESNET}_norm1": ("unet.down_blocks.0.resnets.0.norm1", "full"),
    f"{TEXT}_self_attn_q_proj": ("text_encoder.encoder.layers.0.self_attn.q_proj", "ia3"),
    f"{TEXT}_self_attn_k_proj": ("text_encoder.encoder.layers.0.self_attn.k_proj", "boft"),
    f"{TEXT}_layer_norm1": ("text_encoder.encoder.layers.0.layer_norm1", "norm"),
}


@pytest.fixture(scope="module")
def bundle(tiny_sd1_folder: Path) -> ModelBundle:
    return bundle_of(tiny_sd1_folder)


def side(bundle: ModelBundle, name: str) -> int:
    component, _, inner = name.partition(".")
    return bundle.components[component].get_submodule(inner).weight.shape[0]


@pytest.fixture
def tensors(bundle: ModelBundle) -> dict[str, Tensor]:
    """One file with a module of each method, in fp16."""
    width, hidden = side(bundle, NAMES[f"{BLOCK}_attn1_to_q"][0]), side(bundle, NAMES[f"{TEXT}_layer_norm1"][0])
    parts = {
        f"{BLOCK}_attn1_to_q": {name: (width, 2) if name.endswith("a") else (2, width) for name in (
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")} | {"alpha": ()},
        f"{BLOCK}_attn1_to_k": {"lora_up.weight": (width, 2), "lora_down.weight": (2, width),
            "dora_scale": (1, width), "alpha": (1,)},
        f"{BLOCK}_attn1_to_v": {"a1.weight": (width, 2), "a2.weight": (2, width), "b1.weight": (width, 2),
            "b2.weight": (2, width)},
        f"{BLOCK}_norm1": {"w_norm": (width,), "b_norm": (width,)},
        f"{RESNET}_conv1": {"lokr_w1": (4, 4), "lokr_w2": (width // 4, width // 4, 3, 3), "alpha": ()},
        f"{RESNET}_conv2": {"oft_blocks": (width // 4, 4, 4), "rescale": (width, 1, 1, 1), "alpha": ()},
        f"{RESNET}_norm1": {"diff": (width,), "diff_b": (width,)},
        f"{TEXT}_self_attn_q_proj": {"weight": (hidden,)},
        f"{TEXT}_self_attn_k_proj": {"oft_blocks": (2, hidden // 4, 4, 4)},
        f"{TEXT}_layer_norm1": {"w_norm": (hidden,), "b_norm": (hidden,)},
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{module}.{suffix}": torch.randn(shape, generator=generator).half()
        for module, suffixes in parts.items()
        for suffix, shape in suffixes.items()
    }
    return found | {f"{TEXT}_self_attn_q_proj.on_input": torch.tensor(1)}


def read(tensors: dict[str, Tensor], bundle: ModelBundle, folder: Path) -> AdapterState:
    save_file(tensors, folder / "a.safetensors")
    return read_adapter(folder / "a.safetensors", bundle.components)


def test_a_mixed_file_is_read_whole(tensors: dict[str, Tensor], bundle: ModelBundle, tmp_path: Path) -> None:
    updates = read(tensors, bundle, tmp_path).updates
    assert {name: update.method for name, update in updates.items()} == dict(NAMES.values())
    assert {update.method for update in updates.values()} == {method.method for method in METHODS}
    assert all(update.dtype == torch.float16 for update in updates.values())
    assert sum(len(update.parts()) + (update.alpha is not None) for update in updates.values()) == len(tensors)
    assert updates[NAMES[f"{BLOCK}_attn1_to_k"][0]].alpha == float(tensors[f"{BLOCK}_attn1_to_k.alpha"])


def test_every_method_is_written_and_read_bit_for_bit(
    tensors: dict[str, Tensor], bundle: ModelBundle, tmp_path: Path
) -> None:
    write_kohya(tmp_path / "b.safetensors", read(tensors, bundle, tmp_path))
    written = load_file(tmp_path / "b.safetensors")
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            assert float(written[key]) == float(tensor)
        else:
            assert written[key].dtype == tensor.dtype
            assert torch.equal(written[key], tensor)


def test_the_text_encoder_is_read_without_the_inner_text_model(
    tensors: dict[str, Tensor], bundle: ModelBundle, tmp_path: Path
) -> None:
    bare = {key.replace("_text_model_", "_"): value for key, value in tensors.items()}
    assert read(bare, bundle, tmp_path).updates.keys() == {name for name, _ in NAMES.values()}


def test_a_lora_with_a_bias_beside_it_is_read(bundle: ModelBundle, tmp_path: Path) -> None:
    name, width = "unet.down_blocks.0.resnets.0.conv1", side(bundle, "unet.down_blocks.0.resnets.0.conv1")
    tensors = {
        f"{RESNET}_conv1.lora_up.weight": torch.ones(width, 1, 1, 1),
        f"{RESNET}_conv1.lora_down.weight": torch.ones(1, width, 3, 3),
        f"{RESNET}_conv1.diff_b": torch.full((width,), 2.0),
    }
    change = read(tensors, bundle, tmp_path).updates[name].bias_delta(0.5)
    assert change is not None
    assert torch.equal(change, torch.ones(width))


def test_all_that_is_wrong_is_told_at_once(tensors: dict[str, Tensor], bundle: ModelBundle, tmp_path: Path) -> None:
    tensors.pop(f"{BLOCK}_attn1_to_q.hada_w2_b")
    tensors[f"{BLOCK}_attn1_to_k.dora_scale"] = torch.ones(5, 1)
    tensors[f"{RESNET}_conv1.lokr_w1_a"] = torch.ones(4, 1)
    tensors[f"{RESNET}_conv2.rescale"][0] = torch.inf
    tensors[f"{RESNET}_norm1.diff"] = torch.ones(7)
    tensors[f"{TEXT}_layer_norm1.lora_mid.weight"] = torch.ones(2, 2)
    tensors[f"{TEXT}_self_attn_q_proj.hada_w3"] = torch.ones(2)
    tensors[f"{BLOCK}_attn1_to_q2.w_norm"] = torch.ones(2)
    tensors[f"{BLOCK}_attn2_to_q.diff_b"] = torch.ones(side(bundle, NAMES[f"{BLOCK}_attn1_to_q"][0]))
    with pytest.raises(AdapterFileError) as caught:
        read(tensors, bundle, tmp_path)
    text = str(caught.value)
    assert "9 problems" in text
    for said in (
        f"{BLOCK}_attn1_to_q: the hada_w2_b half is missing",
        f"{BLOCK}_attn1_to_k: the magnitude (dora_scale) [5, 1] does not fit",
        f"{RESNET}_conv1: both lokr_w1 and lokr_w1_a are there",
        f"{RESNET}_conv2: holds NaN or infinite values (in rescale)",
        f"{RESNET}_norm1: diff [7] does not fit",
        f"{TEXT}_layer_norm1: holds parts of several methods: lora (mid), norm (b_norm and w_norm)",
        f"{TEXT}_self_attn_q_proj.hada_w3: unknown key",
        f"{BLOCK}_attn1_to_q2: no such module in the model",
        f"{BLOCK}_attn2_to_q: changes the module's bias, but it has none",
    ):
        assert said in text


def test_a_file_is_split_without_a_model(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    raw = read_raw(tmp_path / "a.safetensors")
    assert raw.layout.name == "kohya"
    assert raw.parts.updates.keys() == NAMES.keys()
    assert not raw.parts.unknown


def test_suffixes_and_parts_are_one_to_one() -> None:
    parts = {part for method in METHODS for part in method.allowed}
    assert set(SUFFIXES.values()) == parts | {"alpha"}
    assert len(set(SUFFIXES.values())) == len(SUFFIXES)
