"""Taking an adapter out of a base again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapter_samples import adapter_file, bundle_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_kit.errors import ModelError, RecipeError
from lora_kit.merging import MergeOptions, merge

Adapters = list[tuple[Path, float]]
OUT = MergeOptions(unmerge=True)


@pytest.fixture
def adapters(tiny_sd1_folder: Path, tmp_path: Path) -> Adapters:
    components = bundle_of(tiny_sd1_folder).components
    return [(adapter_file(tmp_path / f"{seed}.safetensors", components, seed), s) for seed, s in ((0, 0.7), (1, -0.4))]


def metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        return file.metadata()


def farthest(a: Path, b: Path) -> float:
    """Largest difference of a tensor, relative to its largest value; UNet and text encoder."""
    worst = 0.0
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        got, expected = load_file(a / name), load_file(b / name)
        for key, tensor in expected.items():
            off = float((got[key].double() - tensor.double()).abs().max())
            worst = max(worst, off / (float(tensor.abs().max()) or 1.0))
    return worst


def half(folder: Path, out: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(folder, out)
    for name in ("unet", "text_encoder"):
        for file in (out / name).glob("*.safetensors"):
            save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_base_comes_back_within_the_bound_that_is_printed(tiny_sd1_folder, tmp_path, adapters, dtype):
    base = half(tiny_sd1_folder, tmp_path / "base", dtype)
    merge(base, adapters, tmp_path / "merged")
    report = merge(
        tmp_path / "merged", adapters, tmp_path / "out", MergeOptions(unmerge=True, original=base, scales=())
    )
    assert report.notes == ()
    assert report.bound is not None
    assert report.distance is not None
    measured = farthest(tmp_path / "out", base)
    assert report.distance.relative == pytest.approx(measured, rel=1e-12)
    assert 0 < measured <= report.bound
    # Two roundings of weights that the merge made a few times larger: some units in the last place.
    assert report.bound < 40 * torch.finfo(dtype).eps
    assert 0 < report.distance.equal < report.distance.tensors


def test_the_record_moves_from_merged_to_unmerged(tiny_sd1_folder, tmp_path, adapters):
    merge(tiny_sd1_folder, adapters, tmp_path / "both")
    merge(tmp_path / "both", adapters[:1], tmp_path / "one", OUT)
    after = metadata_of(tmp_path / "one")
    assert [one["file"] for one in json.loads(after["lora_kit.merged"])] == ["1.safetensors"]
    assert [one["file"] for one in json.loads(after["lora_kit.unmerged"])] == ["0.safetensors"]
    merge(tmp_path / "one", adapters[1:], tmp_path / "none", OUT)
    assert "lora_kit.merged" not in metadata_of(tmp_path / "none")


def test_another_scale_than_the_recorded_one_is_refused(tiny_sd1_folder, tmp_path, adapters):
    merge(tiny_sd1_folder, adapters[:1], tmp_path / "merged", MergeOptions(scales=["unet.**=0.5"]))
    with pytest.raises(RecipeError, match=r"was merged at 0.7 with unet.\*\*=0.5, so taking it out at 1 would not"):
        merge(tmp_path / "merged", [(adapters[0][0], 1.0)], tmp_path / "out", OUT)
    with pytest.raises(RecipeError, match=r"was merged at 0\.7 with"):
        merge(tmp_path / "merged", adapters[:1], tmp_path / "out", OUT)
    assert not (tmp_path / "out").exists()
    options = MergeOptions(unmerge=True, scales=["unet.**=0.5"])
    merge(tmp_path / "merged", adapters[:1], tmp_path / "out", options)
    assert farthest(tmp_path / "out", tiny_sd1_folder) < 40 * torch.finfo(torch.float32).eps


def test_a_base_that_does_not_know_the_adapter_gets_a_warning(tiny_sd1_folder, tmp_path, adapters):
    report = merge(tiny_sd1_folder, adapters[:1], tmp_path / "out", OUT)
    assert any("does not say that 0.safetensors is in it" in note for note in report.notes)
    merge(tiny_sd1_folder, [(adapters[0][0], -0.7)], tmp_path / "negative")
    assert farthest(tmp_path / "out", tmp_path / "negative") == 0


def test_an_original_of_another_shape_is_refused_and_nothing_is_left(
    tiny_sd1_folder, tiny_sd2_folder, tmp_path, adapters
):
    merge(tiny_sd1_folder, adapters, tmp_path / "merged")
    with pytest.raises(ModelError, match="is another network"):
        options = MergeOptions(unmerge=True, original=tiny_sd2_folder)
        merge(tmp_path / "merged", adapters, tmp_path / "out", options)
    assert {path.name for path in tmp_path.iterdir()} == {"0.safetensors", "1.safetensors", "merged"}
