from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kit.errors import ModelError
from lora_kit.models import base_hash, load_bundle, loading, skeleton
from lora_kit.recipe.sections import ModelSection


@pytest.fixture
def copied(tiny_sd1_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd1_folder, tmp_path / "base"))


@pytest.mark.parametrize(
    ("fixture", "family", "prediction"),
    [("tiny_sd1_folder", "sd1", "epsilon"), ("tiny_sd2_folder", "sd2", "v_prediction")],
)
def test_family_and_prediction_type_come_from_the_configs(
    fixture: str, family: str, prediction: str, request: pytest.FixtureRequest
) -> None:
    for load in (load_bundle, skeleton):
        bundle = load(ModelSection(base=str(request.getfixturevalue(fixture))))
        assert (bundle.family.name, bundle.prediction_type) == (family, prediction)


def test_the_prediction_type_can_be_overridden(tiny_sd1_folder: Path) -> None:
    bundle = skeleton(ModelSection(base=str(tiny_sd1_folder), prediction_type="v_prediction"))
    assert bundle.prediction_type == "v_prediction"


def test_the_base_is_frozen_in_eval_mode_and_in_the_asked_precision(tiny_sd1_folder: Path) -> None:
    bundle = load_bundle(ModelSection(base=str(tiny_sd1_folder)), dtype=torch.bfloat16)
    networks = (bundle.unet, bundle.text_encoder, bundle.vae)
    dtypes = [{p.dtype for p in network.parameters()} for network in networks]
    assert dtypes == [{torch.bfloat16}, {torch.bfloat16}, {torch.float32}]
    assert not any(p.requires_grad for network in networks for p in network.parameters())
    assert not any(network.training for network in networks)


def test_weights_are_those_of_the_files(tiny_sd1_folder: Path) -> None:
    bundle = load_bundle(ModelSection(base=str(tiny_sd1_folder)))
    saved = load_file(tiny_sd1_folder / "unet" / "diffusion_pytorch_model.safetensors")
    state = bundle.unet.state_dict()
    assert set(saved) == set(state)
    assert all(torch.equal(saved[name], state[name]) for name in saved)


def test_a_text_encoder_saved_before_transformers_5_6_loads_alike(tiny_sd1_folder: Path, copied: Path) -> None:
    path = copied / "text_encoder" / "model.safetensors"
    old = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    save_file({**old, "text_model.embeddings.position_ids": torch.arange(77)[None]}, path, {"format": "pt"})
    first, second = (load_bundle(ModelSection(base=str(folder))) for folder in (tiny_sd1_folder, copied))
    assert base_hash(first) == base_hash(second)


def test_a_variant_is_read_from_its_own_files(tiny_sd1_folder: Path, copied: Path) -> None:
    for path in copied.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    bundle = load_bundle(ModelSection(base=str(copied), variant="fp16"))
    assert base_hash(bundle) == base_hash(load_bundle(ModelSection(base=str(tiny_sd1_folder))))


def test_fresh_weights_leave_the_global_random_state_alone(tiny_sd1_folder: Path) -> None:
    torch.manual_seed(5)
    load_bundle(ModelSection(base=str(tiny_sd1_folder), weights="fresh"), seed=3)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


def test_fresh_text_encoders_are_seeded(tiny_sd1_folder: Path) -> None:
    section = ModelSection(base=str(tiny_sd1_folder), weights="fresh")
    hashes = [base_hash(load_bundle(section, seed=seed)) for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_skeleton_holds_no_weights(tiny_sd2_folder: Path) -> None:
    bundle = skeleton(ModelSection(base=str(tiny_sd2_folder)))
    networks = (bundle.unet, bundle.text_encoder, bundle.vae)
    assert all(p.is_meta for network in networks for p in network.parameters())


def _remove(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def _edit(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _drop_tensor(name: str, tensor: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = load_file(folder / name)
        del state[tensor]
        save_file(state, folder / name, {"format": "pt"})

    return change


def _cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


UNET_FILE, TEXT_FILE = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove("model_index.json"), "without model_index.json"),
        (_remove("unet"), "has no folder unet"),
        (_remove("unet/config.json"), "its configs cannot be read"),
        (_remove(UNET_FILE), "its unet cannot be read"),
        (_remove("tokenizer/tokenizer.json"), r"tokenizer holds neither tokenizer\.json nor vocab\.json"),
        (_cut("unet/config.json"), "its configs cannot be read"),
        (_cut("model_index.json"), "is not JSON"),
        (_cut(UNET_FILE), "its unet cannot be read"),
        (_cut(TEXT_FILE), "its text_encoder cannot be read"),
        (_drop_tensor(UNET_FILE, "conv_in.bias"), r"unet .*conv_in\.bias"),
        (_drop_tensor(TEXT_FILE, "final_layer_norm.bias"), r"text_encoder lacks final_layer_norm\.bias"),
        (_edit("unet/config.json", in_channels=5), "a depth-to-image model"),
        (_edit("unet/config.json", cross_attention_dim=64), "attends to text states of width 64"),
        (_edit("unet/config.json", block_out_channels=[64, 64]), "unet"),
        (_edit("text_encoder/config.json", intermediate_size=128), "text_encoder"),
        (_edit("scheduler/scheduler_config.json", prediction_type="score"), "predicts 'score'"),
        (_edit("model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]), "two text encoders"),
        (
            _edit("model_index.json", unet=["diffusers", "FluxTransformer2DModel"]),
            "whose unet is a FluxTransformer2DModel",
        ),
    ],
)
def test_a_damaged_or_foreign_folder_is_one_clear_error(
    change: Callable[[Path], None], message: str, copied: Path
) -> None:
    change(copied)
    with pytest.raises(ModelError, match=message):
        load_bundle(ModelSection(base=str(copied)))


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    for base in (f"{tmp_path}/nothing", "./nothing", "nothing.safetensors", "a/b/c"):
        with pytest.raises(ModelError, match="there is no file or folder"):
            load_bundle(ModelSection(base=base))


def test_a_hub_id_without_a_network() -> None:
    with pytest.raises(ModelError, match=r"neither a file or folder here .* nor a diffusers pipeline"):
        load_bundle(ModelSection(base="nobody-here/no-such-model", revision="main"))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "base.zip").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"is a \.zip file"):
        load_bundle(ModelSection(base=str(tmp_path / "base.zip")))


def test_the_packaged_base_when_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "TINY_FOLDER", tmp_path / "tiny_base")
    with pytest.raises(ModelError, match="this installation has no"):
        load_bundle(ModelSection(base="tiny"))


def test_the_packaged_base_is_a_diffusers_folder(tiny_sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "TINY_FOLDER", tiny_sd1_folder)
    assert load_bundle(ModelSection(base="tiny")).source == "tiny"
