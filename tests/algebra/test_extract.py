"""Extraction: what was added to a base comes out again, whatever the layouts and precisions."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_samples import bundle_of, random_state
from ldm_reference import checkpoint_shapes, small
from low_rank_samples import dense, relative
from safetensors.torch import load_file, save_file
from small_tokenizers import small_tokenizer
from torch import Tensor

from lora_kit.adapters import AdapterState, write_kohya
from lora_kit.algebra import Budget, Extracted, ExtractOptions, extract, open_adapters
from lora_kit.errors import ModelError, RecipeError
from lora_kit.models import load_bundle, pipeline
from lora_kit.models.single_file.ldm_keys import claim, structure
from lora_kit.recipe import ModelSection

RANK_4 = ExtractOptions(budget=Budget(rank=4))


def changed_folder(base: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy whose UNet and text encoder hold change(dotted parameter name, tensor)."""
    shutil.copytree(base, out)
    for component in ("unet", "text_encoder"):
        (file,) = (out / component).glob("*.safetensors")
        tensors = load_file(file)
        bare = {key: f"{component}.{key.removeprefix('text_model.')}" for key in tensors}
        save_file({key: change(bare[key], tensor).contiguous() for key, tensor in tensors.items()}, file)
    return out


def adding(state: AdapterState) -> Callable[[str, Tensor], Tensor]:
    def change(name: str, tensor: Tensor) -> Tensor:
        update = state.updates.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if update is None:
            return tensor
        return (tensor.double() + dense(update).view(tensor.shape)).to(tensor.dtype)

    return change


def check_updates(found: Extracted, state: AdapterState, tolerance: float) -> None:
    assert found.updates.keys() == state.updates.keys()
    for name, update in found.updates.items():
        expected = dense(state.updates[name])
        assert relative(dense(update), expected) < tolerance, name


@pytest.fixture
def state(folder: Path) -> AdapterState:
    return random_state(bundle_of(folder).components)


def test_an_added_adapter_comes_out_again(folder: Path, state: AdapterState, tmp_path: Path) -> None:
    """ΔW was rounded to the weights' fp32: its noise stays, a few parts in 1e7 of weights as large as ΔW."""
    tuned = changed_folder(folder, tmp_path / "tuned", adding(state))
    found = extract(folder, tuned, RANK_4)
    check_updates(found, state, 1e-5)
    assert not found.left_out
    assert found.unchanged > 0
    for loss in found.losses:
        assert loss.rank == 4
        assert loss.norm == pytest.approx(float(dense(state.updates[loss.module]).norm()), rel=1e-5)


def test_kept_energy_finds_the_rank_that_was_added(folder: Path, state: AdapterState, tmp_path: Path) -> None:
    tuned = changed_folder(folder, tmp_path / "tuned", adding(state))
    found = extract(folder, tuned, ExtractOptions(budget=Budget(keep=1 - 1e-9)))
    assert {name: update.rank for name, update in found.updates.items()} == {
        name: min(update.rank or 0, *dense(update).shape) for name, update in state.updates.items()
    }


def test_the_error_is_the_dense_one(folder: Path, tmp_path: Path) -> None:
    """A full-rank change, cut to rank 2: the losses against an SVD of the difference of the files."""
    generator = torch.Generator().manual_seed(1)
    tuned = changed_folder(
        folder, tmp_path / "tuned", lambda _, tensor: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
    )
    found = extract(folder, tuned, ExtractOptions(budget=Budget(rank=2)))
    before, after = (load_file(next((path / "unet").glob("*.safetensors"))) for path in (folder, tuned))
    checked = 0
    for loss in found.losses:
        if not loss.module.startswith("unet."):
            continue
        key = f"{loss.module.removeprefix('unet.')}.weight"
        delta = (after[key].double() - before[key].double()).flatten(1)
        lost = float(torch.linalg.svdvals(delta)[2:].norm())
        assert loss.norm == pytest.approx(float(delta.norm()), rel=1e-12)
        assert loss.lost == pytest.approx(lost, rel=1e-6)
        error = float((delta - dense(found.updates[loss.module])).norm())
        assert loss.error == pytest.approx(error, rel=1e-9)
        checked += 1
    assert checked > 20
    assert any(name.endswith("conv_norm_out.weight") for name in found.left_out)
    assert any(name.endswith("token_embedding.weight") for name in found.left_out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_alone_is_no_change(folder: Path, state: AdapterState, tmp_path: Path, dtype: torch.dtype) -> None:
    cast = changed_folder(folder, tmp_path / "cast", lambda _, tensor: tensor.to(dtype))
    with pytest.raises(RecipeError, match=r"nothing that an adapter could hold: all its \d+ parameters equal"):
        extract(folder, cast, RANK_4)
    change = adding(state)
    tuned = changed_folder(folder, tmp_path / "tuned", lambda name, tensor: change(name, tensor).to(dtype))
    found = extract(folder, tuned, RANK_4)
    assert {update.dtype for update in found.updates.values()} == {dtype}
    # Weights and ΔW are about as large as each other: rounding of the tuned weights, and of the factors.
    check_updates(found, state, 8 * torch.finfo(dtype).eps)


def test_norms_and_biases_on_request(folder: Path, tmp_path: Path) -> None:
    """A LoRA with its bias, a bias alone, a norm of which only the bias moved; written, read, and the same."""
    moved = {
        "unet.mid_block.resnets.0.conv1.weight",
        "unet.mid_block.resnets.0.conv1.bias",
        "unet.conv_in.bias",
        "unet.conv_norm_out.weight",
        "text_encoder.final_layer_norm.bias",
    }
    tuned = changed_folder(folder, tmp_path / "tuned", lambda name, one: one + 0.5 if name in moved else one)
    plain = extract(folder, tuned, RANK_4)
    assert set(plain.updates) == {"unet.mid_block.resnets.0.conv1"}
    assert set(plain.left_out) == {name for name in moved if "conv1.weight" not in name}
    found = extract(folder, tuned, ExtractOptions(budget=Budget(rank=4), norms=True, biases=True))
    assert not found.left_out
    write_kohya(tmp_path / "out.safetensors", AdapterState(found.updates, {}))
    keys = set(load_file(tmp_path / "out.safetensors"))
    assert {"lora_unet_conv_in.diff_b", "lora_unet_conv_norm_out.w_norm"} <= keys
    assert {"lora_unet_mid_block_resnets_0_conv1.diff_b", "lora_te_text_model_final_layer_norm.b_norm"} <= keys
    (opened,) = open_adapters([tmp_path / "out.safetensors"], str(folder))
    half = torch.tensor(0.5, dtype=torch.float64)
    for name in moved:
        module, _, part = name.rpartition(".")
        update = opened.state.updates[module]
        delta = (update.weight_delta if part == "weight" else update.bias_delta)(1.0, None, torch.float64)
        assert delta is not None
        assert torch.allclose(delta, half.expand_as(delta), atol=1e-5)
    untouched = opened.state.updates["text_encoder.final_layer_norm"].weight_delta(1.0)
    assert untouched is not None
    assert not untouched.any()


@pytest.fixture(scope="module", params=[1, 2])
def single_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SD1 or SD2 checkpoint in the LDM layout; SD2's text encoder packs q, k and v."""
    folder = tmp_path_factory.mktemp("single")
    tensors = {
        name: 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        for name, shape in checkpoint_shapes(small(request.param, len(small_tokenizer()))).items()
    }
    small_tokenizer().save_pretrained(folder / "tokenizer")
    save_file(tensors, folder / "base.safetensors")
    return folder / "base.safetensors"


def as_folder(single_file: Path, out: Path) -> Path:
    """The checkpoint as diffusers saves it."""
    tokenizer = str(single_file.parent / "tokenizer")
    section = ModelSection(base=str(single_file), tokenizer=tokenizer, prediction_type="epsilon")
    pipeline(load_bundle(section)).save_pretrained(out)
    return out


def changed_file(single_file: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    tensors = load_file(single_file)
    form = structure(tensors)
    for key, tensor in tensors.items():
        found = claim(key, form)
        if found is None or found.component == "vae":
            continue
        parts = [
            change(f"{found.component}.{name}", part)
            for name, part in zip(found.names, tensor.chunk(len(found.names)), strict=True)
        ]
        tensors[key] = torch.cat(parts)
    save_file(tensors, out)
    return out


def test_single_files_and_folders_mix(single_file: Path, tmp_path: Path) -> None:
    folder = as_folder(single_file, tmp_path / "base")
    state = random_state(bundle_of(folder).components, seed=3)
    tuned_folder = changed_folder(folder, tmp_path / "tuned", adding(state))
    tuned_file = changed_file(single_file, tmp_path / "tuned.safetensors", adding(state))
    expected = extract(folder, tuned_folder, RANK_4)
    check_updates(expected, state, 1e-5)
    for base, tuned in ((single_file, tuned_file), (single_file, tuned_folder), (folder, tuned_file)):
        found = extract(base, tuned, RANK_4)
        assert found.updates.keys() == expected.updates.keys()
        check_updates(found, state, 1e-5)


def test_one_base_in_two_layouts_does_not_differ(single_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="equal the base's"):
        extract(single_file, as_folder(single_file, tmp_path / "base"), RANK_4)


def test_a_pickled_checkpoint_is_read_too(single_file: Path, tmp_path: Path) -> None:
    tensors = load_file(single_file)
    key = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
    tensors[key] = tensors[key] + 1
    torch.save({"state_dict": tensors}, tmp_path / "tuned.ckpt")
    found = extract(single_file, tmp_path / "tuned.ckpt", ExtractOptions(budget=Budget(rank=1)))
    (update,) = found.updates.values()
    assert relative(dense(update), torch.ones_like(dense(update))) < 1e-5


def test_other_architectures_are_refused_with_what_differs(
    tiny_sd1_folder: Path, tiny_sd2_folder: Path, single_file: Path
) -> None:
    with pytest.raises(ModelError, match=r"not of one architecture \(\d+ problems\)[\s\S]*only .* has it"):
        extract(tiny_sd1_folder, tiny_sd2_folder, RANK_4)
    with pytest.raises(ModelError, match="not of one architecture"):
        extract(tiny_sd1_folder, single_file, RANK_4)


def test_a_tuned_weight_that_is_not_finite_is_named(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    def change(name: str, tensor: Tensor) -> Tensor:
        return tensor * float("nan") if name == "unet.conv_in.weight" else tensor

    tuned = changed_folder(tiny_sd1_folder, tmp_path / "tuned", change)
    with pytest.raises(ModelError, match=r"unet\.conv_in\.weight: one of the two bases holds NaN"):
        extract(tiny_sd1_folder, tuned, RANK_4)
