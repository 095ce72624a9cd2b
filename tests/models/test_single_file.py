from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from ldm_reference import checkpoint_shapes, small
from safetensors.torch import save_file
from small_tokenizers import small_tokenizer
from torch import Tensor

from lora_kit.errors import ModelError
from lora_kit.models import ModelBundle, base_hash, load_bundle, skeleton
from lora_kit.recipe.sections import ModelSection


def _random_checkpoint(version: int) -> dict[str, Tensor]:
    """Random weights, each different, in the LDM layout."""
    state: dict[str, Tensor] = {}
    for name, shape in checkpoint_shapes(small(version, len(small_tokenizer()))).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        state[name] = torch.randn(shape, generator=generator) * 0.05
    return state


@pytest.fixture(scope="module")
def checkpoints() -> dict[int, dict[str, Tensor]]:
    return {1: _random_checkpoint(1), 2: _random_checkpoint(2)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[int, dict[str, Tensor]]) -> Path:
    """A folder with sd1.safetensors, sd2.safetensors and a tokenizer."""
    folder = tmp_path_factory.mktemp("single")
    small_tokenizer().save_pretrained(folder / "tokenizer")
    for version, state in checkpoints.items():
        save_file(state, folder / f"sd{version}.safetensors")
    return folder


def _section(files: Path, version: int, **fields: Any) -> ModelSection:
    if version == 2:
        fields.setdefault("prediction_type", "v_prediction")
    base = str(files / f"sd{version}.safetensors")
    return ModelSection(**{"base": base, "tokenizer": str(files / "tokenizer"), **fields})


def _load(files: Path, version: int, **fields: Any) -> ModelBundle:
    return load_bundle(_section(files, version, **fields))


def _converted(version: int, state: dict[str, Tensor], bundle: ModelBundle) -> dict[str, dict[str, Tensor]]:
    """What diffusers' own converters make of the checkpoint."""
    if version == 1:
        text = single_file_utils.convert_ldm_clip_checkpoint(state)
        text = {name: tensor for name, tensor in text.items() if not name.endswith("position_ids")}
    else:
        last = "cond_stage_model.model.transformer.resblocks.2."  # diffusers knows the 24th layer by name only
        whole = {name: tensor for name, tensor in state.items() if not name.startswith(last)}
        text = single_file_utils.convert_open_clip_checkpoint(bundle.text_encoder, whole)
        text.pop("text_projection.weight", None)
    return {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(dict(state), dict(bundle.unet.config)),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(state), dict(bundle.vae.config)),
        "text_encoder": {name.removeprefix("text_model."): tensor for name, tensor in text.items()},
    }


@pytest.mark.parametrize("version", [1, 2])
def test_weights_equal_those_of_diffusers_own_conversion(
    version: int, files: Path, checkpoints: dict[int, dict[str, Tensor]]
) -> None:
    bundle = _load(files, version)
    wanted = _converted(version, checkpoints[version], bundle)
    for component, network in {**bundle.components, "vae": bundle.vae}.items():
        got = {name.removeprefix("text_model."): tensor for name, tensor in network.state_dict().items()}
        assert set(got) == set(wanted[component]), component
        assert [name for name in got if not torch.equal(got[name], wanted[component][name])] == []


@pytest.mark.parametrize("version", [1, 2])
def test_outputs_equal_those_of_the_same_base_as_a_diffusers_folder(version: int, files: Path, tmp_path: Path) -> None:
    from lora_kit.models import pipeline

    bundle = _load(files, version)
    pipeline(bundle).save_pretrained(tmp_path / "folder")
    again = load_bundle(ModelSection(base=str(tmp_path / "folder")))
    assert again.family.name == bundle.family.name == f"sd{version}"
    assert again.prediction_type == bundle.prediction_type
    assert base_hash(again) == base_hash(bundle)
    noisy, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 900])
    outputs = [
        one.family.predict(one, noisy, timesteps, one.family.condition(one, ["red apple", ""]))
        for one in (bundle, again)
    ]
    assert torch.equal(*outputs)


def test_a_pickled_checkpoint_loads_as_the_safetensors_does(files: Path, tmp_path: Path) -> None:
    state = _random_checkpoint(1)
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "sd1.ckpt")
    assert base_hash(_load(files, 1, base=str(tmp_path / "sd1.ckpt"))) == base_hash(_load(files, 1))


def test_the_base_is_held_in_the_asked_precision_and_frozen(files: Path) -> None:
    bundle = load_bundle(_section(files, 1), dtype=torch.bfloat16)
    networks = (bundle.unet, bundle.text_encoder, bundle.vae)
    assert [{p.dtype for p in network.parameters()} for network in networks] == [
        {torch.bfloat16},
        {torch.bfloat16},
        {torch.float32},
    ]
    assert not any(p.requires_grad or p.is_meta for network in networks for p in network.parameters())
    assert not any(b.is_meta for network in networks for b in network.buffers())
    assert not any(module.training for network in networks for module in network.modules())


def test_a_skeleton_has_the_shapes_and_no_weights(files: Path) -> None:
    laid, loaded = skeleton(_section(files, 2)), _load(files, 2)
    assert laid.tokenizer is None
    for component, network in laid.components.items():
        whole = loaded.components[component].state_dict()
        assert {n: (t.shape, t.device.type) for n, t in network.state_dict().items()} == {
            n: (t.shape, "meta") for n, t in whole.items()
        }


def test_fresh_weights_come_from_the_seed_and_the_vae_keeps_its_own(files: Path) -> None:
    section = _section(files, 1, weights="fresh")
    first, same, other = load_bundle(section, seed=1), load_bundle(section, seed=1), load_bundle(section, seed=2)
    assert base_hash(first) == base_hash(same) != base_hash(other)
    kept = _load(files, 1).vae.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in first.vae.state_dict().items())


def test_linear_projections_of_v2_held_as_1x1_convolutions(
    files: Path, checkpoints: dict[int, dict[str, Tensor]], tmp_path: Path
) -> None:
    """As some converters wrote them: the same network."""
    pointwise = {
        name: tensor[:, :, None, None].contiguous() if ".proj_" in name and tensor.ndim == 2 else tensor
        for name, tensor in checkpoints[2].items()
    }
    assert sum(tensor.ndim == 4 for tensor in pointwise.values()) > sum(t.ndim == 4 for t in checkpoints[2].values())
    save_file(pointwise, tmp_path / "sd2.safetensors")
    bundle = _load(files, 2, base=str(tmp_path / "sd2.safetensors"))
    assert bundle.family.name == "sd2"
    assert base_hash(bundle) == base_hash(_load(files, 2))


def test_v2_pads_captions_with_token_zero(files: Path) -> None:
    tokenizer: Any = _load(files, 2).tokenizer
    assert tokenizer([""], padding="max_length").input_ids[0][2:] == [0] * 75


def test_v2_without_a_prediction_type_asks_for_it(files: Path) -> None:
    section = ModelSection(base=str(files / "sd2.safetensors"), tokenizer=str(files / "tokenizer"))
    with pytest.raises(ModelError, match=r"set model\.prediction_type: epsilon .* or v_prediction"):
        load_bundle(section)


@pytest.mark.parametrize(
    "metadata",
    [{"modelspec.prediction_type": "v"}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}],
    ids=["prediction_type", "architecture"],
)
def test_the_prediction_type_is_read_from_the_header(metadata: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "sd2.safetensors"
    save_file(_random_checkpoint(2), path, metadata)
    assert skeleton(ModelSection(base=str(path))).prediction_type == "v_prediction"


def test_the_scale_of_the_latents_is_read_where_the_file_holds_it(tmp_path: Path) -> None:
    save_file({**_random_checkpoint(1), "scale_factor": torch.tensor(0.5)}, tmp_path / "sd1.safetensors")
    assert skeleton(ModelSection(base=str(tmp_path / "sd1.safetensors"))).vae.config.scaling_factor == 0.5


def test_without_a_tokenizer_at_hand_the_message_says_how_to_give_one(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kit.models.tokenizers._KNOWN", (("nobody/has-this", ""),))
    with pytest.raises(ModelError, match=r"Set model\.tokenizer to a folder"):
        load_bundle(ModelSection(base=str(files / "sd1.safetensors")))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(files: Path, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="They do not belong together"):
        _load(files, 1, tokenizer=str(tmp_path))


def _file_with(path: Path, changed: dict[str, Tensor | None]) -> ModelSection:
    state = {**_random_checkpoint(1), **changed}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return ModelSection(base=str(path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model.diffusion_model.out.2.bias": None}, r"incomplete: its unet lacks conv_out\.bias"),
        ({"model.diffusion_model.out.2.weight": None}, "incomplete: it has no tensor"),
        ({"somebody.else": torch.zeros(1)}, r"holds somebody\.else"),
        ({"first_stage_model.encoder.mid.attn_1.x.weight": torch.zeros(1)}, r"attn_1\.x\.weight"),
        ({"model.diffusion_model.time_embed.0.bias": torch.zeros(3)}, r"time_embedding\.linear_1\.bias .*\[3\]"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 5, 3, 3)}, "a depth-to-image model"),
        ({"conditioner.embedders.0.x": torch.zeros(1)}, "a Stable Diffusion XL checkpoint"),
    ],
)
def test_a_checkpoint_that_is_not_whole_or_another_model(
    changed: dict[str, Tensor | None], message: str, files: Path, tmp_path: Path
) -> None:
    section = _file_with(tmp_path / "base.safetensors", changed)
    with pytest.raises(ModelError, match=message):
        load_bundle(section.model_copy(update={"tokenizer": str(files / "tokenizer")}))


def test_a_file_without_a_vae_says_so(tmp_path: Path) -> None:
    state = {name: t for name, t in _random_checkpoint(1).items() if not name.startswith("first_stage_model.")}
    save_file(state, tmp_path / "base.safetensors")
    with pytest.raises(ModelError, match="has no VAE"):
        skeleton(ModelSection(base=str(tmp_path / "base.safetensors")))


def test_an_adapter_is_named_as_such(tmp_path: Path) -> None:
    save_file(
        {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ModelError, match="is an adapter"):
        skeleton(ModelSection(base=str(tmp_path / "a.safetensors")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"", "is empty"),
        (b"\x00\x01garbage that is no header at all", "damaged or incomplete"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_that_is_something_else(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"base{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        skeleton(ModelSection(base=str(path)))


@pytest.mark.parametrize("kept", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_cut_off_file_is_one_clear_error(suffix: str, kept: float, files: Path, tmp_path: Path) -> None:
    whole = files / "sd1.safetensors"
    if suffix == ".ckpt":
        whole = tmp_path / "whole.ckpt"
        torch.save(_random_checkpoint(1), whole)
    content = whole.read_bytes()
    path = tmp_path / f"base{suffix}"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ModelError, match="damaged or incomplete"):
        skeleton(ModelSection(base=str(path)))


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "callbacks": _Code()}, tmp_path / "base.ckpt")
    with pytest.raises(ModelError, match="holds more than tensors"):
        skeleton(ModelSection(base=str(tmp_path / "base.ckpt")))
    assert capsys.readouterr().out == ""
