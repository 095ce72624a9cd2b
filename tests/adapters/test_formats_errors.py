from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_samples import adapter_file, bundle_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_kit.adapters import read_adapter
from lora_kit.errors import AdapterFileError
from lora_kit.models import ModelBundle

TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def bundle(tiny_sd1_folder: Path) -> ModelBundle:
    return bundle_of(tiny_sd1_folder)


@pytest.fixture
def tensors(bundle: ModelBundle, tmp_path: Path) -> dict[str, Tensor]:
    return load_file(adapter_file(tmp_path / "good.safetensors", bundle.components))


def message_for(tensors: dict[str, Tensor], bundle: ModelBundle, tmp_path: Path) -> str:
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(tmp_path / "bad.safetensors", bundle.components)
    return str(caught.value)


def test_all_problems_are_told_at_once(tensors: dict[str, Tensor], bundle: ModelBundle, tmp_path: Path) -> None:
    spellings = sorted({key.partition(".")[0] for key in tensors})
    a, b, c, d = spellings[:4]
    tensors.pop(f"{a}.lora_up.weight")
    tensors[f"{b}.lora_down.weight"] = torch.zeros(2, 7)
    tensors[f"{c}.lora_up.weight"][0, 0] = torch.nan
    tensors[f"{d}.alpha"] = torch.tensor(torch.inf)
    tensors[f"{TO_Q}x.lora_down.weight"] = torch.zeros(1, 32)
    tensors["stray"] = torch.zeros(1)
    text = message_for(tensors, bundle, tmp_path)
    assert "6 problems" in text
    assert f"{a}: the up half is missing" in text
    assert f"{b}: down [2, 7] and up" in text
    assert f"{c}: holds NaN or infinite values" in text
    assert f"{d}: alpha is inf" in text
    assert f"{TO_Q}x: no such module in the model. Did you mean {TO_Q}" in text
    assert "stray: unknown key" in text


def test_ranks_of_the_halves_must_agree(tensors: dict[str, Tensor], bundle: ModelBundle, tmp_path: Path) -> None:
    tensors[f"{TO_Q}.lora_down.weight"] = torch.zeros(5, 32)
    tensors[f"{TO_Q}.lora_up.weight"] = torch.zeros(32, 6)
    said = message_for(tensors, bundle, tmp_path)
    assert "down [5, 32] and up [32, 6] do not fit the module's weight [32, 32]" in said


def test_one_module_under_two_spellings_is_refused(
    tensors: dict[str, Tensor], bundle: ModelBundle, tmp_path: Path
) -> None:
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    for part in ("lora_down.weight", "lora_up.weight"):
        tensors[f"lora_te_encoder_layers_0_mlp_fc1.{part}"] = tensors[f"{name}.{part}"].clone()
    assert "is in the file twice" in message_for(tensors, bundle, tmp_path)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (f"{TO_Q}.oft_diag", "OFT adapter of an old LyCORIS"),
        (f"{TO_Q}.lambda_layer", "T-LoRA"),
        (f"{TO_Q}.bias_indices", "sparse remainders"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "Stable Diffusion XL"),
    ],
)
def test_what_is_not_supported_is_named(
    key: str, what: str, tensors: dict[str, Tensor], bundle: ModelBundle, tmp_path: Path
) -> None:
    text = message_for(tensors | {key: torch.zeros(2, 2)}, bundle, tmp_path)
    assert "not supported yet" in text
    assert what in text


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "a whole checkpoint"),
        ("down_blocks.0.resnets.0.conv1.weight", "a network's own weights"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder's own weights"),
        ("emb_params", "a textual-inversion embedding"),
        ("anything", "unknown layout"),
    ],
)
def test_what_is_no_adapter_is_named(key: str, what: str, bundle: ModelBundle, tmp_path: Path) -> None:
    assert what in message_for({key: torch.zeros(1)}, bundle, tmp_path)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "cut off or damaged"),
        (b"PK\x03\x04 and so on, a zip", "pickled"),
        (b"<!DOCTYPE html><html>", "saved web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_other_files_are_named(data: bytes, what: str, bundle: ModelBundle, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(AdapterFileError, match=what):
        read_adapter(tmp_path / "a.safetensors", bundle.components)


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_a_file_cut_off_says_so(kept: float, bundle: ModelBundle, tmp_path: Path) -> None:
    path = adapter_file(tmp_path / "a.safetensors", bundle.components)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(AdapterFileError, match="cut off or damaged"):
        read_adapter(path, bundle.components)


def test_a_missing_file_and_a_folder_say_so(bundle: ModelBundle, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="no such file"):
        read_adapter(tmp_path / "none.safetensors", bundle.components)
    with pytest.raises(AdapterFileError, match="a folder"):
        read_adapter(tmp_path, bundle.components)
