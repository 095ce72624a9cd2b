"""An adapter of a 4-channel base on a 9-channel one, and the reverse: refused, or told where all shapes fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_samples import bundle_of, random_state
from ldm_reference import small
from merge_samples import networks_of, random_checkpoint
from safetensors.torch import load_file, save_file

from lora_kit.adapters import AdapterState, write_kohya
from lora_kit.algebra.lowrank_header import base_facts
from lora_kit.errors import AdapterFileError
from lora_kit.inference import prepare
from lora_kit.merging import MergeOptions, merge
from lora_kit.merging.base import open_base
from lora_kit.models import skeleton
from lora_kit.models.outline import read_outline
from lora_kit.recipe import ModelSection

PAIRS = [
    ("tiny_sd1_folder", "sd1", "tiny_inpainting_folder", "sd1-inpainting"),
    ("tiny_inpainting_folder", "sd1-inpainting", "tiny_sd1_folder", "sd1"),
    ("tiny_sd2_folder", "sd2", "tiny_inpainting2_folder", "sd2-inpainting"),
]


def adapter_of(folder: Path, path: Path, family: str, wanted: str) -> Path:
    """Random updates of the modules whose names have `wanted`, in a file whose header names the family."""
    state = random_state(bundle_of(folder).components, wanted=lambda module: wanted in module.name)
    write_kohya(path, AdapterState(state.updates, {"lora_kit.family": family}))
    return path


@pytest.mark.parametrize(("theirs", "family", "mine", "own"), PAIRS)
def test_one_that_adapts_the_first_convolution_is_refused_with_both_families_named(
    theirs: str, family: str, mine: str, own: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = adapter_of(request.getfixturevalue(theirs), tmp_path / "a.safetensors", family, "conv_in")
    base: Path = request.getfixturevalue(mine)
    channels = [4, 9] if "inpainting" in own else [9, 4]
    # down: [rank, in, 3, 3]
    said = f"(?s)was trained on {family}, and .*{base.name} is {own}: give the base.*conv_in.*{channels[0]}, 3, 3"
    with pytest.raises(AdapterFileError, match=said):
        prepare(str(base), [path])
    with pytest.raises(AdapterFileError, match=said):
        merge(base, [(path, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("theirs", "family", "mine", "own"), PAIRS)
def test_one_whose_shapes_all_fit_is_taken_and_told(
    theirs: str, family: str, mine: str, own: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = adapter_of(request.getfixturevalue(theirs), tmp_path / "a.safetensors", family, "attn")
    base: Path = request.getfixturevalue(mine)
    (warning,) = prepare(str(base), [path]).warnings
    assert warning == f"{path}: was trained for {family}; this base is {own}"
    report = merge(base, [(path, 1.0)], tmp_path / "out")
    assert report.notes == (f"a.safetensors says it is for {family}, the base is {own}; all its shapes fit",)


def test_a_base_of_a_merge_tells_its_family(tiny_inpainting_folder: Path, tiny_inpainting2_folder: Path) -> None:
    assert open_base(tiny_inpainting_folder).family == "sd1-inpainting"
    assert open_base(tiny_inpainting2_folder).family == "sd2-inpainting"


def test_an_extracted_files_header_names_what_readers_know_and_what_it_is() -> None:
    facts = base_facts("sd2-inpainting", "epsilon")
    assert (facts["ss_base_model_version"], facts["ss_v2"]) == ("sd_v2", "True")
    assert facts["lora_kit.family"] == "sd2-inpainting"


def test_a_single_file_of_nine_channels_is_an_inpainting_base(tmp_path: Path) -> None:
    for version in (1, 2):
        state = random_checkpoint(small(version, 600)._replace(in_channels=9))
        assert state["model.diffusion_model.input_blocks.0.0.weight"].shape[1] == 9
        path = tmp_path / f"sd{version}-inpainting.safetensors"
        save_file(state, path)
        section = ModelSection(base=str(path))
        bundle = skeleton(section)  # SD2's inpainting model is one only: nothing need be asked
        assert (bundle.family.name, bundle.prediction_type) == (f"sd{version}-inpainting", "epsilon")
        assert read_outline(section).family == bundle.family.name
        assert open_base(path).family == bundle.family.name
        assert bundle.unet.conv_in.weight.shape[1] == 9


def test_a_single_file_of_nine_channels_is_merged_into(tmp_path: Path) -> None:
    """The first convolution too; the written network gives what the adapted one gives (checked by the merge itself)."""
    base = tmp_path / "base.safetensors"
    save_file(random_checkpoint(small(1, 600)._replace(in_channels=9)), base)
    components = networks_of(base)
    state = random_state(components, wanted=lambda module: "conv_in" in module.name or "attn" in module.name)
    assert state.updates["unet.conv_in"].parts()["down"].shape[1] == 9
    write_kohya(tmp_path / "a.safetensors", state)
    merge(base, [(tmp_path / "a.safetensors", 1.0)], tmp_path / "out.safetensors", MergeOptions(verify_network=True))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    before, after = load_file(base)[name], load_file(tmp_path / "out.safetensors")[name]
    assert after.shape == before.shape and not after.equal(before)
