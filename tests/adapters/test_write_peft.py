from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import bundle_of, dora_state, in_blocks, random_state
from library_outputs import assert_same, dora_tolerance, double_bundle, outputs, outputs_by_weight

from lora_kit.adapters import AdapterState, LoraUpdate, read_adapter, write_adapter
from lora_kit.errors import AdapterFileError
from lora_kit.targeting import ModuleInfo


def in_unet(module: ModuleInfo) -> bool:
    return module.name.startswith("unet.") and in_blocks(module)


def loaded_by_peft(base: Path, folders: dict[str, Path]) -> Any:
    """The base with each component's folder loaded by PEFT itself."""
    from peft import PeftModel

    bundle = double_bundle(base)
    networks = dict(bundle.components)
    for component, adapter in folders.items():
        networks[component] = PeftModel.from_pretrained(networks[component], adapter).get_base_model()
    return outputs(networks["unet"].double(), networks["text_encoder"].double())


def test_peft_loads_both_folders_that_we_write(folder: Path, tmp_path: Path) -> None:
    state = random_state(bundle_of(folder).components)
    write_adapter(tmp_path / "out", state, "peft")
    got = loaded_by_peft(folder, {one: tmp_path / "out" / one for one in ("unet", "text_encoder")})
    assert_same(got, outputs_by_weight(folder, state))


def test_peft_loads_the_dora_that_we_write(folder: Path, tmp_path: Path) -> None:
    state = dora_state(folder)
    write_adapter(tmp_path / "out", state, "peft")
    got = loaded_by_peft(folder, {one: tmp_path / "out" / one for one in ("unet", "text_encoder")})
    assert_same(got, outputs_by_weight(folder, state), dora_tolerance(state))
    again = read_adapter(tmp_path / "out", bundle_of(folder).components).updates
    for name, update in state.updates.items():
        assert all(torch.equal(again[name].parts()[part], tensor) for part, tensor in update.parts().items())


def test_one_network_is_one_folder(folder: Path, tmp_path: Path) -> None:
    state = random_state(bundle_of(folder).components, wanted=in_unet)
    write_adapter(tmp_path / "out", state, "peft")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert_same(loaded_by_peft(folder, {"unet": tmp_path / "out"}), outputs_by_weight(folder, state))


@pytest.mark.parametrize("wanted", [in_blocks, in_unet])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_bit_for_bit(dtype: torch.dtype, wanted, tiny_sd2_folder: Path, tmp_path: Path) -> None:
    components = bundle_of(tiny_sd2_folder).components
    state = random_state(components, wanted=wanted)._replace(metadata={"ss_seed": "1"})
    write_adapter(tmp_path / "out", state, "peft", dtype)
    got = read_adapter(tmp_path / "out", components)
    assert got.metadata == {"ss_seed": "1"}
    assert got.updates.keys() == state.updates.keys()
    for name, update in state.updates.items():
        assert got.updates[name].alpha == update.alpha
        for part, tensor in update.parts().items():
            assert torch.equal(got.updates[name].parts()[part], tensor.to(dtype))


def test_the_weights_file_alone_is_read_by_the_config_beside_it(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    components = bundle_of(tiny_sd1_folder).components
    state = random_state(components, wanted=in_unet)
    write_adapter(tmp_path / "out", state, "peft")
    file = tmp_path / "out" / "adapter_model.safetensors"
    got = read_adapter(file, components).updates
    assert {name: one.alpha for name, one in got.items()} == {name: one.alpha for name, one in state.updates.items()}
    (tmp_path / "out" / "adapter_config.json").unlink()
    with pytest.raises(AdapterFileError, match=r"are in adapter_config\.json; there is none beside it"):
        read_adapter(file, components)


def test_equal_content_makes_equal_folders(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    state = random_state(bundle_of(tiny_sd1_folder).components)
    write_adapter(tmp_path / "a", state, "peft")
    write_adapter(tmp_path / "b", AdapterState(dict(reversed(state.updates.items())), {}), "peft")
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_name_that_ends_another_is_anchored(tmp_path: Path) -> None:
    """PEFT takes a pattern for the end of a name: without `^` the short one would decide for the long one too."""
    updates = {
        "unet.conv": LoraUpdate(torch.ones(1, 2), torch.ones(2, 1), 3.0),
        "unet.block.conv": LoraUpdate(torch.ones(2, 2), torch.ones(2, 2), 5.0),
        "unet.block.other": LoraUpdate(torch.ones(2, 2), torch.ones(2, 2), 5.0),
    }
    write_adapter(tmp_path / "out", AdapterState(updates, {}), "peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {"^conv": 1})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (5, {"^conv": 3})


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    update = LoraUpdate(torch.full((1, 2), 1e6), torch.ones(2, 1), 1.0)
    with pytest.raises(AdapterFileError, match="NaN or infinite"):
        write_adapter(tmp_path / "out", AdapterState({"unet.x": update}, {}), "peft", torch.float16)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterFileError, match="exists already"):
        write_adapter(tmp_path / "out", AdapterState({"unet.x": update}, {}), "peft")
