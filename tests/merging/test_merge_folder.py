"""Merging against an independent float64 computation, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapter_samples import adapter_file, bundle_of, random_state
from diffusers import UNet2DConditionModel
from merge_samples import expected_weights, weights_of
from safetensors.torch import load_file, save_file

from lora_kit.adapters import AdapterState, read_adapter, write_kohya
from lora_kit.errors import RecipeError
from lora_kit.merging import MergeOptions, merge, plan_merge


def weights(folder: Path, component: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / component).glob("*.safetensors")
    return load_file(file)


@pytest.fixture
def adapters(tiny_sd1_folder: Path, tmp_path: Path) -> list[tuple[Path, float]]:
    components = bundle_of(tiny_sd1_folder).components
    return [(adapter_file(tmp_path / f"{seed}.safetensors", components, seed), s) for seed, s in ((0, 0.7), (1, -0.4))]


def test_every_weight_is_the_base_plus_all_updates(tiny_sd1_folder, tmp_path, adapters):
    report = merge(tiny_sd1_folder, adapters, tmp_path / "out")
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
    merge(tiny_sd1_folder, adapters, tmp_path / "out")
    rest = [f for f in tiny_sd1_folder.rglob("*") if f.is_file() and f.parent.name not in ("unet", "text_encoder")]
    assert rest
    for file in rest:
        assert (tmp_path / "out" / file.relative_to(tiny_sd1_folder)).read_bytes() == file.read_bytes()


def test_a_merge_of_nothing_is_refused(tiny_sd1_folder, tmp_path, adapters):
    with pytest.raises(RecipeError, match="no adapter was given at a scale other than 0"):
        merge(tiny_sd1_folder, [(path, 0.0) for path, _ in adapters], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_verification_reports_the_casts_cost(tiny_sd1_folder, tmp_path, adapters):
    half = merge(tiny_sd1_folder, adapters, tmp_path / "half", MergeOptions(dtype=torch.float16))
    full = merge(tiny_sd1_folder, adapters, tmp_path / "full")
    assert half.weights is not None
    assert full.weights is not None
    # Half a unit in the last place of the largest value is the least that a cast can cost where any is cast at all.
    assert 2**-12 <= half.weights.cast <= half.weights.error * (1 + 2**-10)
    assert half.weights.error <= 2**-11 * 1.01
    assert full.weights.error <= 2**-20
    assert max(half.weights.worst, full.weights.worst) <= 1


def test_the_written_networks_are_the_adapted_ones(tiny_sd1_folder, tmp_path, adapters):
    options = [MergeOptions(dtype=dtype, verify_network=True) for dtype in (torch.float16, None)]
    half, full = (
        {error.component: error for error in merge(tiny_sd1_folder, adapters, tmp_path / str(n), option).networks}
        for n, option in enumerate(options)
    )
    for component in ("unet", "text_encoder"):
        # fp32 rounding through some dozen layers; fp16 has 2^13 times larger units.
        assert max(full[component][1:]) < 1e-5
        assert half[component].cast > 100 * full[component].cast


def test_an_existing_folder_and_the_base_itself_are_refused(tiny_sd1_folder, tmp_path, adapters):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not an empty folder"):
        merge(tiny_sd1_folder, adapters, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(RecipeError, match="is the base"):
        merge(tiny_sd1_folder, adapters, tiny_sd1_folder)


def test_an_adapter_of_another_shape_leaves_nothing_behind(tiny_sd1_folder, tiny_sd2_folder, tmp_path):
    state = random_state(bundle_of(tiny_sd2_folder).components)
    with pytest.raises(Exception) as caught:
        merge(tiny_sd1_folder, [(state, 1.0)], tmp_path / "out")
    assert type(caught.value).__module__ == "lora_kit.errors"
    assert list(tmp_path.iterdir()) == []


def sharded(base: Path, out: Path) -> Path:
    """`base` with its UNet cut into shards by diffusers itself."""
    shutil.copytree(base, out)
    shutil.rmtree(out / "unet")
    UNet2DConditionModel.from_pretrained(base / "unet").save_pretrained(out / "unet", max_shard_size="300KB")
    return out


def unet_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "unet").glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_shards_stay_shards_and_diffusers_reads_them(tiny_sd1_folder, tmp_path, adapters):
    base = sharded(tiny_sd1_folder, tmp_path / "sharded")
    assert len(list((base / "unet").glob("*-of-*.safetensors"))) > 2
    merge(tiny_sd1_folder, adapters, tmp_path / "whole")
    merge(base, adapters, tmp_path / "out")
    names = {path.name for path in (base / "unet").iterdir()}
    assert {path.name for path in (tmp_path / "out" / "unet").iterdir()} == names
    whole, shards = unet_tensors(tmp_path / "whole"), unet_tensors(tmp_path / "out")
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[key], shards[key]) for key in whole)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").state_dict()
    assert all(torch.equal(loaded[key], whole[key]) for key in whole)


def test_a_shard_that_nothing_changes_is_copied_byte_for_byte(tiny_sd1_folder, tmp_path):
    base = sharded(tiny_sd1_folder, tmp_path / "sharded")
    state = random_state(bundle_of(base).components, wanted=lambda one: one.name == "unet.conv_in")
    (change,) = plan_merge(base, [(state, 1.0)]).changes
    merge(base, [(state, 1.0)], tmp_path / "out")
    for file in (base / "unet").glob("*.safetensors"):
        same = (tmp_path / "out" / "unet" / file.name).read_bytes() == file.read_bytes()
        assert same == (f"unet/{file.name}" != change.file)


def test_a_cast_writes_every_shard_and_its_new_size(tiny_sd1_folder, tmp_path, adapters):
    base = sharded(tiny_sd1_folder, tmp_path / "sharded")
    merge(base, adapters, tmp_path / "out", MergeOptions(dtype=torch.bfloat16))
    tensors = unet_tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    (index,) = (tmp_path / "out" / "unet").glob("*.index.json")
    total = sum(tensor.numel() * 2 for tensor in tensors.values())
    assert json.loads(index.read_text())["metadata"]["total_size"] == total


def test_pickled_components_become_safetensors(tiny_sd1_folder, tmp_path, adapters):
    base = tmp_path / "pickled"
    shutil.copytree(tiny_sd1_folder, base)
    for component, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        (file,) = (base / component).glob("*.safetensors")
        torch.save(load_file(file), base / component / f"{name}.bin")
        file.unlink()
    report = merge(base, adapters, tmp_path / "out")
    merge(tiny_sd1_folder, adapters, tmp_path / "expected")
    for component, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        got = load_file(tmp_path / "out" / component / f"{name}.safetensors")
        expected = weights(tmp_path / "expected", component)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in got)
        assert not list((tmp_path / "out" / component).glob("*.bin"))
    assert "pytorch_model.bin is written as safetensors" in report.notes


def test_other_variants_of_a_changed_component_are_left_out_and_named(tiny_sd1_folder, tmp_path, adapters):
    base = tmp_path / "variants"
    shutil.copytree(tiny_sd1_folder, base)
    shutil.copy(
        base / "unet" / "diffusion_pytorch_model.safetensors",
        base / "unet" / "diffusion_pytorch_model.fp16.safetensors",
    )
    report = merge(base, adapters, tmp_path / "out")
    assert "unet: left out, not merged: diffusion_pytorch_model.fp16.safetensors" in report.notes
    assert not (tmp_path / "out" / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base_is_rounded_once(tiny_sd1_folder, tmp_path, adapters, dtype):
    """The written value is the fp32 sum rounded: no nearer number of the precision exists, but for ties of fp32."""
    base = tmp_path / "half"
    shutil.copytree(tiny_sd1_folder, base)
    for file in (base / "unet").glob("*.safetensors"):
        save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    merge(base, adapters, tmp_path / "out")
    components = bundle_of(base).components
    states = [(read_adapter(path, components), scale) for path, scale in adapters]
    before = weights_of({"unet": components["unet"]})
    unet = [(AdapterState({n: u for n, u in s.updates.items() if n.startswith("unet")}, {}), x) for s, x in states]
    wanted, sizes = expected_weights(before, unet)
    for key, weight in unet_tensors(tmp_path / "out").items():
        assert weight.dtype == dtype
        exact = wanted[f"unet.{key}"]
        half_unit = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
        slack = 12 * 2**-24 * sizes[f"unet.{key}"]
        assert bool(((weight.double() - exact).abs() <= half_unit + slack).all()), key


def test_the_plan_lists_every_change_and_writes_nothing(tiny_sd1_folder, tmp_path, adapters):
    before = sorted(tmp_path.iterdir())
    plan = plan_merge(tiny_sd1_folder, adapters, MergeOptions(scales=["unet.mid_block.**=0.5"]))
    assert sorted(tmp_path.iterdir()) == before
    states = [read_adapter(path, bundle_of(tiny_sd1_folder).components) for path, _ in adapters]
    assert {change.module for change in plan.changes} == set(states[0].updates)
    for change in plan.changes:
        factor = 0.5 if change.module.startswith("unet.mid_block.") else 1.0
        assert [update.scale for update in change.updates] == [0.7 * factor, -0.4 * factor]
        assert change.updates[0].rank == states[0].updates[change.module].rank
    assert len(plan.text().splitlines()) == len(plan.changes) + 2


def test_what_a_merge_cannot_carry_is_noted(tiny_sd1_folder, tmp_path):
    """A noise schedule and learned tokens are no weights."""
    state = random_state(bundle_of(tiny_sd1_folder).components)
    header = {"ss_zero_terminal_snr": "True"}
    write_kohya(tmp_path / "a.safetensors", AdapterState(state.updates, header))
    notes = merge(tiny_sd1_folder, [(tmp_path / "a.safetensors", 1.0)], tmp_path / "out").notes
    assert any("zero terminal SNR" in note and "timestep_spacing='trailing'" in note for note in notes)
