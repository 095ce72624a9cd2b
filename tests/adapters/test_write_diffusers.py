from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_samples import bundle_of, dora_state, in_blocks, random_state
from library_outputs import assert_same, dora_tolerance, outputs_by_weight, outputs_of_diffusers
from safetensors import safe_open

from lora_kit.adapters import AdapterState, LoraUpdate, read_adapter, write_adapter
from lora_kit.adapters.updates import build_update
from lora_kit.errors import AdapterFileError
from lora_kit.targeting import ModuleInfo


def of_text_mlp(module: ModuleInfo) -> bool:
    return ".mlp." in module.name


def of_unet(module: ModuleInfo) -> bool:
    return module.name.startswith("unet.") and in_blocks(module)


@pytest.mark.parametrize("wanted", [in_blocks, of_unet, of_text_mlp])
def test_diffusers_loads_what_we_write_with_each_modules_own_alpha(wanted, folder: Path, tmp_path: Path) -> None:
    state = random_state(bundle_of(folder).components, wanted=wanted)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_adapter(path, state, "diffusers")
    assert_same(outputs_of_diffusers(folder, path), outputs_by_weight(folder, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_bit_for_bit(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    components = bundle_of(folder).components
    state = random_state(components)
    write_adapter(tmp_path / "a", state, "diffusers", dtype)
    got = read_adapter(tmp_path / "a", components)
    assert got.updates.keys() == state.updates.keys()
    for name, update in state.updates.items():
        assert got.updates[name].alpha == update.alpha
        for part, tensor in update.parts().items():
            assert torch.equal(got.updates[name].parts()[part], tensor.to(dtype))


def test_equal_content_makes_equal_files_and_the_header_goes_along(folder: Path, tmp_path: Path) -> None:
    updates = random_state(bundle_of(folder).components).updates
    header = {"ss_seed": "1", "sshs_model_hash": "of the old file", "x": "ü"}
    write_adapter(tmp_path / "a", AdapterState(updates, header), "diffusers")
    turned = dict(reversed(updates.items()))
    write_adapter(tmp_path / "b", AdapterState(turned, dict(reversed(header.items()))), "diffusers")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata.pop("lora_adapter_metadata"))
    assert metadata == {"ss_seed": "1", "x": "ü"}
    assert set(config) >= {"unet.r", "unet.lora_alpha", "text_encoder.alpha_pattern"}


def test_a_component_that_the_layout_does_not_know_is_refused(tmp_path: Path) -> None:
    update = LoraUpdate(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    with pytest.raises(AdapterFileError, match="vae: diffusers knows only unet, text_encoder"):
        write_adapter(tmp_path / "a", AdapterState({"vae.x": update}, {}), "diffusers")
    with pytest.raises(AdapterFileError, match="nothing to write"):
        write_adapter(tmp_path / "a", AdapterState({}, {}), "diffusers")
    assert not list(tmp_path.iterdir())


def test_diffusers_loads_the_dora_that_we_write(folder: Path, tmp_path: Path) -> None:
    state = dora_state(folder)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_adapter(path, state, "diffusers")
    assert_same(outputs_of_diffusers(folder, path), outputs_by_weight(folder, state), dora_tolerance(state))


def test_dora_of_the_inputs_is_refused(tmp_path: Path) -> None:
    """[1, in] beside [out, 1]: over a square weight only the orientation tells them apart."""
    parts = {"down": torch.ones(1, 4), "up": torch.ones(4, 1), "magnitude": torch.ones(1, 4)}
    state = AdapterState({"unet.x": build_update(parts, None, (4, 4))}, {})
    with pytest.raises(AdapterFileError, match="its DoRA magnitudes are those of the inputs"):
        write_adapter(tmp_path / "a", state, "diffusers")
