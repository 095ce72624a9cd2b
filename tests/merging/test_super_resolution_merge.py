"""Merging into a super-resolution folder: old names in its files, the network check, other families' files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from adapter_samples import bundle_of, random_state
from safetensors.torch import load_file, save_file

from lora_kit.adapters import read_raw, write_adapter
from lora_kit.errors import AdapterFileError
from lora_kit.inference import prepare
from lora_kit.merging.merge import MergeOptions, merge
from lora_kit.merging.other_family import fitted_to
from lora_kit.models import skeleton
from lora_kit.models.known_trees import known_trees
from lora_kit.recipe import ModelSection

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def old_name(key: str) -> str:
    """As diffusers wrote attention blocks without text when the published model was converted."""
    head, attention, tail = key.rpartition(".attentions.")
    for new, old in OLD.items():
        tail = tail.replace(f".{new}.", f".{old}.")
    return head + attention + tail


@pytest.fixture
def adapter(tiny_super_resolution_folder: Path, tmp_path: Path) -> Path:
    """LoRA of every linear and convolution of the blocks, in diffusers' layout, whose header says its family."""
    state = random_state(skeleton(ModelSection(base=str(tiny_super_resolution_folder))).components)
    named = state._replace(metadata={"lora_kit.family": "ldm_super_resolution"})
    write_adapter(tmp_path / "adapter.safetensors", named, "diffusers")
    return tmp_path / "adapter.safetensors"


def test_the_merged_network_is_the_adapted_one(
    tiny_super_resolution_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    options = MergeOptions(verify_network=True)
    report = merge(tiny_super_resolution_folder, [(adapter, 0.7)], tmp_path / "merged", options)
    assert [network.component for network in report.networks] == ["unet"]
    assert report.modules.keys() == {"unet"}
    copied = tmp_path / "merged" / "vqvae" / Path(WEIGHTS).name
    assert copied.read_bytes() == (tiny_super_resolution_folder / "vqvae" / Path(WEIGHTS).name).read_bytes()


def test_old_files_are_merged_under_their_old_names(
    tiny_super_resolution_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    """The published weights are of 2022; diffusers renames them when it loads."""
    old = shutil.copytree(tiny_super_resolution_folder, tmp_path / "old")
    tensors = load_file(old / WEIGHTS)
    save_file({old_name(key): tensor for key, tensor in tensors.items()}, old / WEIGHTS, {"format": "pt"})
    assert "mid_block.attentions.0.proj_attn.weight" in load_file(old / WEIGHTS)
    merge(tiny_super_resolution_folder, [(adapter, 1.0)], tmp_path / "new merged")
    merge(old, [(adapter, 1.0)], tmp_path / "old merged")
    expected, found = load_file(tmp_path / "new merged" / WEIGHTS), load_file(tmp_path / "old merged" / WEIGHTS)
    assert found.keys() == {old_name(key) for key in expected}
    assert all(torch.equal(found[old_name(key)], tensor) for key, tensor in expected.items())
    changed = [key for key in expected if not torch.equal(expected[key], tensors[key])]
    assert any(".to_out.0." in key for key in changed)
    loaded = bundle_of(tmp_path / "old merged").unet.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


def test_an_adapter_of_another_family_is_refused_with_both_named(
    tiny_super_resolution_folder: Path, tiny_sd1_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    """Stable Diffusion's on super-resolution, and the reverse; to merge and to draw with."""
    plain = tmp_path / "sd1.safetensors"
    state = random_state(bundle_of(tiny_sd1_folder).components)
    write_adapter(plain, state._replace(metadata={"lora_kit.family": "sd1"}), "kohya")
    for base, file, theirs, own in (
        (tiny_super_resolution_folder, plain, "sd1", "ldm_super_resolution"),
        (tiny_sd1_folder, adapter, "ldm_super_resolution", "sd1"),
    ):
        said = rf"was trained on {theirs}, and .* is {own}: give the base it belongs to"
        with pytest.raises(AdapterFileError, match=said):
            merge(base, [(file, 1.0)], tmp_path / "out")
        with pytest.raises(AdapterFileError, match=said):
            prepare(ModelSection(base=str(base)), [file])
        assert not (tmp_path / "out").exists()


def test_the_first_shapes_that_differ_between_the_published_models_are_named(tmp_path: Path) -> None:
    """An adapter without a word on its base: its shapes tell."""
    name = "unet.down_blocks.0.resnets.0.conv1"
    parts = {f"{name}.lora_A.weight": torch.zeros(2, 160, 3, 3), f"{name}.lora_B.weight": torch.zeros(160, 2, 1, 1)}
    save_file(parts, tmp_path / "file.safetensors")
    raw = read_raw(tmp_path / "file.safetensors")
    stable_diffusion = {module.name: module for module in known_trees()["sd1"]}
    said = (
        r"(?s)trained on ldm_super_resolution \(by its shapes: .*\), and sd15 is sd1: give the base it belongs to.*"
        r"down \[2, 160, 3, 3\] and up \[160, 2, 1, 1\] do not fit the module's weight \[320, 320, 3, 3\]"
    )
    with pytest.raises(AdapterFileError, match=said):
        fitted_to(tmp_path / "file.safetensors", raw, stable_diffusion, "sd15")
