"""Merging against an independent float64 computation, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_samples import adapter_file, bundle_of, random_state
from safetensors.torch import load_file

from lora_kit.adapters import read_adapter
from lora_kit.errors import RecipeError
from lora_kit.merging import merge_folder


def weights(folder: Path, component: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / component).glob("*.safetensors")
    return load_file(file)


@pytest.fixture
def adapters(tiny_sd1_folder: Path, tmp_path: Path) -> list[tuple[Path, float]]:
    components = bundle_of(tiny_sd1_folder).components
    return [(adapter_file(tmp_path / f"{seed}.safetensors", components, seed), s) for seed, s in ((0, 0.7), (1, -0.4))]


def test_every_weight_is_the_base_plus_all_updates(tiny_sd1_folder, tmp_path, adapters):
    report = merge_folder(tiny_sd1_folder, adapters, tmp_path / "out")
    components = bundle_of(tiny_sd1_folder).components
    states = [(read_adapter(path, components), scale) for path, scale in adapters]
    changed = 0
    for component in ("unet", "text_encoder"):
        before, after = weights(tiny_sd1_folder, component), weights(tmp_path / "out", component)
        assert before.keys() == after.keys()
        for key, weight in after.items():
            name = f"{component}.{key.removesuffix('.weight').removeprefix('text_model.')}"
            wanted, size = before[key].double(), before[key].double().abs()
            for state, scale in states:
                if name in state.updates and key.endswith(".weight"):
                    update = state.updates[name]
                    down, up, alpha = update.down, update.up, update.alpha
                    rank = len(down)
                    delta = scale * alpha / rank * (up.double().flatten(1) @ down.double().flatten(1))
                    wanted = wanted + delta.view_as(wanted)
                    size = size + delta.abs().view_as(wanted) * rank
            changed += not torch.equal(weight, before[key])
            # At most a dozen fp32 roundings of terms whose magnitudes sum to `size`.
            assert bool(((weight.double() - wanted).abs() <= 12 * 2**-24 * size + 1e-12).all()), key
    assert changed == sum(report.modules.values()) == len(states[0][0].updates)


def test_what_no_adapter_touches_is_copied_byte_for_byte(tiny_sd1_folder, tmp_path, adapters):
    merge_folder(tiny_sd1_folder, adapters, tmp_path / "out")
    rest = [f for f in tiny_sd1_folder.rglob("*") if f.is_file() and f.parent.name not in ("unet", "text_encoder")]
    assert rest
    for file in rest:
        assert (tmp_path / "out" / file.relative_to(tiny_sd1_folder)).read_bytes() == file.read_bytes()


def test_a_merge_of_nothing_is_refused(tiny_sd1_folder, tmp_path, adapters):
    with pytest.raises(RecipeError, match="no adapter was given at a scale other than 0"):
        merge_folder(tiny_sd1_folder, [(path, 0.0) for path, _ in adapters], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_verification_reports_the_casts_cost(tiny_sd1_folder, tmp_path, adapters):
    half = merge_folder(tiny_sd1_folder, adapters, tmp_path / "half", torch.float16).verification
    full = merge_folder(tiny_sd1_folder, adapters, tmp_path / "full").verification
    assert half is not None
    assert full is not None
    unet = {name: next(e for e in v.networks if e.component == "unet") for name, v in {"h": half, "f": full}.items()}
    assert unet["f"].cast == 0.0
    assert unet["h"].cast > unet["f"].total
    assert half.weights.worst <= 1


def test_an_existing_folder_and_the_base_itself_are_refused(tiny_sd1_folder, tmp_path, adapters):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not an empty folder"):
        merge_folder(tiny_sd1_folder, adapters, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(RecipeError, match="is the base"):
        merge_folder(tiny_sd1_folder, adapters, tiny_sd1_folder)


def test_an_adapter_of_another_shape_leaves_nothing_behind(tiny_sd1_folder, tiny_sd2_folder, tmp_path):
    state = random_state(bundle_of(tiny_sd2_folder).components)
    with pytest.raises(Exception) as caught:
        merge_folder(tiny_sd1_folder, [(state, 1.0)], tmp_path / "out")
    assert type(caught.value).__module__ == "lora_kit.errors"
    assert list(tmp_path.iterdir()) == []
