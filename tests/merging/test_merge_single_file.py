"""Merging into single-file checkpoints in the LDM layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_samples import random_state
from ldm_reference import Size
from merge_samples import (
    assert_within_rounding,
    changed_keys,
    expected_weights,
    networks_of,
    random_checkpoint,
    weights_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_kit.adapters import AdapterState, read_adapter, write_kohya
from lora_kit.errors import ModelError, RecipeError
from lora_kit.merging import MergeOptions, merge, plan_merge
from lora_kit.targeting import ldm_block

FULL_DEPTH = Size(1, 32, (1, 1, 1, 1), (0, 1, 2), 2, 64, 2, 600, 32, (1, 2), 1)
"""As many blocks as Stable Diffusion v1's UNet has, all of them narrow."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single-file-bases")
    for version in (1, 2):
        save_file(random_checkpoint(version), folder / f"sd{version}.safetensors", {"modelspec.title": "small"})
    return folder


def adapters_for(base: Path, folder: Path) -> list[tuple[Path, float]]:
    networks = networks_of(base)
    files = [folder / f"adapter-{seed}.safetensors" for seed in (0, 1)]
    for seed, file in enumerate(files):
        write_kohya(file, random_state(networks, seed))
    return [(files[0], 0.7), (files[1], -0.4)]


@pytest.mark.parametrize("version", [1, 2])
def test_every_network_weight_is_the_base_plus_all_updates(version, bases, tmp_path):
    """Read back through the loader of single files: packed q, k, v and renamed blocks end in the right rows."""
    base = bases / f"sd{version}.safetensors"
    adapters = adapters_for(base, tmp_path)
    report = merge(base, adapters, tmp_path / "out.safetensors", MergeOptions(verify_network=True))
    before = networks_of(base)
    states = [(read_adapter(path, before), scale) for path, scale in adapters]
    wanted, sizes = expected_weights(weights_of(before), states)
    assert_within_rounding(weights_of(networks_of(tmp_path / "out.safetensors")), wanted, sizes)
    assert sum(report.modules.values()) == len(states[0][0].updates)
    assert {error.component for error in report.networks} == {"unet", "text_encoder"}


@pytest.mark.parametrize("version", [1, 2])
def test_only_what_adapters_name_changes(version, bases, tmp_path):
    base = bases / f"sd{version}.safetensors"
    adapters = adapters_for(base, tmp_path)
    changed = {change.key for change in plan_merge(base, adapters).changes}
    merge(base, adapters, tmp_path / "out.safetensors")
    assert changed_keys(base, tmp_path / "out.safetensors") == changed
    assert not any(key.startswith("first_stage_model.") for key in changed)


def test_one_of_three_packed_matrices_can_change_alone(bases, tmp_path):
    base = bases / "sd2.safetensors"
    module = "text_encoder.encoder.layers.0.self_attn.k_proj"
    state = random_state(networks_of(base), wanted=lambda one: one.name == module)
    merge(base, [(state, 1.0)], tmp_path / "out.safetensors")
    key = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    before, after = load_file(base)[key].chunk(3), load_file(tmp_path / "out.safetensors")[key].chunk(3)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_the_other_spelling_of_clip_is_merged_alike(bases, tmp_path):
    """Some files hold the text encoder as `cond_stage_model.transformer.encoder…`, without `text_model`."""
    base = bases / "sd1.safetensors"
    adapters = adapters_for(base, tmp_path)
    short = {key.replace("transformer.text_model.", "transformer."): value for key, value in load_file(base).items()}
    save_file(short, tmp_path / "short.safetensors")
    for name, source in (("long-out", base), ("short-out", tmp_path / "short.safetensors")):
        merge(source, adapters, tmp_path / f"{name}.safetensors")
    long, short = (load_file(tmp_path / f"{name}.safetensors") for name in ("long-out", "short-out"))
    renamed = {key.replace("transformer.text_model.", "transformer."): value for key, value in long.items()}
    assert renamed.keys() == short.keys()
    assert all(torch.equal(renamed[key], short[key]) for key in short)


def test_linear_projections_held_as_1x1_convolutions(bases, tmp_path):
    """Some SD2 files hold `proj_in` as [out, in, 1, 1]: the same matrix, the same sum, the file's own shape."""
    base = bases / "sd2.safetensors"
    adapters = adapters_for(base, tmp_path)
    state = load_file(base)
    pointwise = {
        key: value[:, :, None, None].contiguous() if ".proj_" in key and value.ndim == 2 else value
        for key, value in state.items()
    }
    assert sum(value.ndim == 4 and state[key].ndim == 2 for key, value in pointwise.items())
    save_file(pointwise, tmp_path / "pointwise.safetensors")
    merge(base, adapters, tmp_path / "a.safetensors")
    merge(tmp_path / "pointwise.safetensors", adapters, tmp_path / "b.safetensors")
    linear, convolution = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    for key, value in convolution.items():
        assert value.shape == pointwise[key].shape
        assert torch.equal(value.flatten(), linear[key].flatten()), key


def test_a_ckpt_gives_the_same_weights_as_safetensors(bases, tmp_path):
    base = bases / "sd1.safetensors"
    adapters = adapters_for(base, tmp_path)
    torch.save({"state_dict": load_file(base), "epoch": 3}, tmp_path / "base.ckpt")
    merge(base, adapters, tmp_path / "a.safetensors")
    report = merge(tmp_path / "base.ckpt", adapters, tmp_path / "b.safetensors")
    assert changed_keys(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == set()
    assert report.notes == ("base.ckpt is written as safetensors; left out, as it holds only tensors: epoch",)
    with pytest.raises(RecipeError, match=r"this must end in \.safetensors"):
        merge(tmp_path / "base.ckpt", adapters, tmp_path / "c.ckpt")


def test_the_header_keeps_what_it_had_and_tells_what_went_in(bases, tmp_path):
    base = bases / "sd1.safetensors"
    adapters = adapters_for(base, tmp_path)
    merge(base, adapters[:1], tmp_path / "once.safetensors", MergeOptions(scales=["unet.**=0.5"]))
    merge(tmp_path / "once.safetensors", adapters[1:], tmp_path / "twice.safetensors")
    with safe_open(tmp_path / "twice.safetensors", "pt") as file:
        metadata = file.metadata()
    first, second = json.loads(metadata["lora_kit.merged"])
    assert metadata["modelspec.title"] == "small"
    assert (first["file"], first["scale"], first["scales"]) == ("adapter-0.safetensors", 0.7, ["unet.**=0.5"])
    assert (second["file"], second["scale"]) == ("adapter-1.safetensors", -0.4)
    assert len(first["sha256"]) == 64


def test_a_cast_takes_the_changed_components_and_leaves_the_vae(bases, tmp_path):
    base = bases / "sd2.safetensors"
    state = load_file(base)
    state["cond_stage_model.model.attn_mask"] = torch.full((77, 77), float("-inf")).triu(1)
    save_file(state, tmp_path / "base.safetensors")
    adapters = adapters_for(tmp_path / "base.safetensors", tmp_path)
    merge(tmp_path / "base.safetensors", adapters, tmp_path / "half.safetensors", MergeOptions(dtype=torch.float16))
    merge(tmp_path / "base.safetensors", adapters, tmp_path / "full.safetensors")
    half, full = load_file(tmp_path / "half.safetensors"), load_file(tmp_path / "full.safetensors")
    for key, value in half.items():
        component = key.startswith(("model.diffusion_model.", "cond_stage_model."))
        assert torch.equal(value, full[key].half() if component else full[key]), key


def test_block_weights_scale_the_blocks_of_the_checkpoint(tmp_path):
    save_file(random_checkpoint(FULL_DEPTH), tmp_path / "base.safetensors")
    networks = networks_of(tmp_path / "base.safetensors")
    state = random_state(networks)
    numbers = [round(0.1 * index, 1) for index in range(26)]
    options = MergeOptions(scales=[",".join(map(str, numbers))])
    merge(tmp_path / "base.safetensors", [(state, 0.5)], tmp_path / "out.safetensors", options)
    names = ["BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12))]
    table = dict(zip(names, numbers, strict=True))
    by_scale = [
        (AdapterState({module: update}, {}), 0.5 * table[str(ldm_block(module))])
        for module, update in state.updates.items()
    ]
    wanted, sizes = expected_weights(weights_of(networks), by_scale)
    assert_within_rounding(weights_of(networks_of(tmp_path / "out.safetensors")), wanted, sizes)


def test_block_weights_are_refused_for_an_unet_with_other_blocks(bases, tmp_path):
    adapters = adapters_for(bases / "sd1.safetensors", tmp_path)
    options = MergeOptions(scales=[",".join(["1"] * 17)])
    with pytest.raises(RecipeError, match="a UNet of 2 levels with 1 residual blocks"):
        merge(bases / "sd1.safetensors", adapters, tmp_path / "out.safetensors", options)


def test_a_base_without_the_text_encoder_takes_an_adapter_of_the_unet(bases, tmp_path):
    state = load_file(bases / "sd1.safetensors")
    unet = {key: value for key, value in state.items() if key.startswith("model.diffusion_model.")}
    save_file(unet, tmp_path / "unet.safetensors")
    networks = networks_of(bases / "sd1.safetensors")
    adapter = random_state(networks, wanted=lambda one: one.name.startswith("unet."))
    assert merge(tmp_path / "unet.safetensors", [(adapter, 1.0)], tmp_path / "out.safetensors").modules.keys() == {
        "unet"
    }


def test_files_that_are_no_base_are_named(bases, tmp_path):
    adapters = adapters_for(bases / "sd1.safetensors", tmp_path)
    with pytest.raises(ModelError, match="is an adapter"):
        merge(adapters[0][0], adapters, tmp_path / "out.safetensors")
    save_file({"conditioner.embedders.0.x": torch.ones(1)}, tmp_path / "xl.safetensors")
    with pytest.raises(ModelError, match="Stable Diffusion XL"):
        merge(tmp_path / "xl.safetensors", adapters, tmp_path / "out.safetensors")
