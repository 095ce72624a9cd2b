"""What a merge refuses: one clear error of ours, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from adapter_samples import adapter_file, bundle_of, random_state
from ldm_reference import Size
from merge_samples import networks_of, random_checkpoint
from safetensors.torch import load_file, save_file

from lora_kit.adapters import AdapterState, LoraUpdate, write_kohya
from lora_kit.errors import AdapterFileError, LoraKitError, ModelError, RecipeError
from lora_kit.merging import MergeOptions, merge
from lora_kit.merging.stored import open_safetensors

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def adapter(tiny_sd1_folder: Path, tmp_path: Path) -> tuple[Path, float]:
    return adapter_file(tmp_path / "a.safetensors", bundle_of(tiny_sd1_folder).components), 1.0


@pytest.fixture
def base(tiny_sd1_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_sd1_folder, tmp_path / "base")
    return tmp_path / "base"


def refused(error: type[LoraKitError], match: str, base: Path, adapters: list, out: Path, **options) -> None:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(error, match=f"(?s){match}"):
        merge(base, adapters, out, MergeOptions(**options))
    assert sorted(out.parent.rglob("*")) == before


def test_a_sum_that_overflows(base, tmp_path):
    shape = load_file(base / UNET)["conv_in.weight"].shape
    huge = LoraUpdate(torch.full((1, *shape[1:]), 300.0), torch.full((shape[0], 1, 1, 1), 300.0), 1.0)
    adapters = [(AdapterState({"unet.conv_in": huge}, {}), 1.0)]
    refused(ModelError, "conv_in.weight.*9e.04.*--dtype bf16", base, adapters, tmp_path / "out", dtype=torch.float16)
    merge(base, adapters, tmp_path / "out", MergeOptions(dtype=torch.bfloat16))


def test_an_unchanged_weight_that_overflows_a_cast(base, tmp_path, adapter):
    state = load_file(base / UNET)
    state["conv_norm_out.weight"][0] = 1e5
    save_file(state, base / UNET)
    refused(ModelError, "conv_norm_out.weight.*1e.05", base, [adapter], tmp_path / "out", dtype=torch.float16)


def test_a_base_with_a_nan_where_it_changes(base, tmp_path, adapter):
    state = load_file(base / UNET)
    state["mid_block.resnets.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, base / UNET)
    refused(ModelError, "mid_block.resnets.0.conv1.weight: the result holds NaN", base, [adapter], tmp_path / "out")


def test_a_base_that_is_cut_off(base, tmp_path, adapter):
    data = (base / UNET).read_bytes()
    for size in (len(data) - 1, len(data) // 2, 100, 7, 0):
        (base / UNET).write_bytes(data[:size])
        refused(ModelError, "damaged or incomplete|empty", base, [adapter], tmp_path / "out")


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: str, values: bytes) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + values


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 10**15]},
        {"data_offsets": [-4, 8]},
        {"data_offsets": [8, 4]},
        {"shape": [10**9, 10**9]},
        {"shape": [-1, 3]},
        {"shape": "many"},
        {"dtype": "F13"},
        {"data_offsets": None},
    ],
)
def test_a_header_that_lies(base, tmp_path, adapter, change):
    header, values = header_of((base / UNET).read_bytes())
    header["conv_in.bias"] |= change
    (base / UNET).write_bytes(with_header(json.dumps(header), values))
    refused(ModelError, "conv_in.bias", base, [adapter], tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a":' * 5000 + "1" + "}" * 5000, '{"a":1,"a":2}', '{"__metadata__":{"a":1}}']
)
def test_a_header_that_is_none(base, tmp_path, adapter, text):
    (base / UNET).write_bytes(with_header(text, b""))
    refused(ModelError, "damaged or incomplete", base, [adapter], tmp_path / "out")


def test_bytes_of_a_header_changed_at_random(base):
    """Read, or refused as damaged: never another error, never a view beyond the file."""
    data = (base / UNET).read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            broken[draw.randrange(length)] = draw.randrange(256)
        (base / "x.safetensors").write_bytes(broken)
        try:
            file = open_safetensors(base / "x.safetensors")
            assert sum(file.read(key).numel() for key in file.tensors) > 0
            outcomes["read"] += 1
        except ModelError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_an_adapter_of_the_other_family_is_told_by_its_header(tmp_path):
    """The families differ in the width of the text states; all else here is as small as may be."""
    size = Size(1, 32, (1, 2), (0,), 1, 768, 1, 600, 32, (1, 2), 1)
    save_file(random_checkpoint(size), tmp_path / "base.safetensors")
    networks = networks_of(tmp_path / "base.safetensors")
    fits = random_state(networks, wanted=lambda one: "to_q" in one.name)
    wrong = LoraUpdate(torch.ones(1, 1024), torch.ones(32, 1), 1.0)
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    for name, updates in (("fits", fits.updates), ("wrong", {module: wrong})):
        write_kohya(tmp_path / f"{name}.safetensors", AdapterState(updates, {"ss_base_model_version": "sd_v2"}))
    base = tmp_path / "base.safetensors"
    match = "was trained on sd2, and .*base.safetensors is sd1: give the base it belongs to.*does not fit the model"
    refused(AdapterFileError, match, base, [(tmp_path / "wrong.safetensors", 1.0)], tmp_path / "out.safetensors")
    report = merge(base, [(tmp_path / "fits.safetensors", 1.0)], tmp_path / "out.safetensors")
    assert report.notes == ("fits.safetensors says it is for sd2, the base is sd1; all its shapes fit",)


def test_a_module_that_the_base_lacks(base, tmp_path):
    update = LoraUpdate(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    adapters = [(AdapterState({"unet.nowhere": update}, {}), 1.0)]
    refused(AdapterFileError, "unet.nowhere: no such module", base, adapters, tmp_path / "out")


def test_a_disk_without_room_is_found_before_any_work(base, tmp_path, adapter, monkeypatch):
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(RecipeError, "no room for the merged file.*Nothing was left behind", base, [adapter], tmp_path / "out")


def test_a_disk_that_fails_half_way(base, tmp_path, adapter, monkeypatch):
    calls = []

    def broken(handle: int, view: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return len(view)

    monkeypatch.setattr(os, "pwrite", broken)
    refused(RecipeError, "cannot be written.*Input/output error", base, [adapter], tmp_path / "out")


def test_places_that_cannot_take_the_result(base, tmp_path, adapter):
    (tmp_path / "file").write_text("mine")
    for out, match in (
        (base, "is the base or inside it"),
        (base / "unet" / "out", "is the base or inside it"),
        (tmp_path / "file", "exists already"),
        (tmp_path / "nowhere" / "out", "does not exist; make it first"),
    ):
        with pytest.raises(RecipeError, match=match):
            merge(base, [adapter], out)
    assert (tmp_path / "file").read_text() == "mine"


def test_bases_that_are_none(tmp_path, adapter):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("<html>")
    (tmp_path / "notes.txt").write_text("x")
    for name, match in (
        ("nowhere", "does not exist"),
        ("empty", "without model_index.json"),
        ("text.safetensors", "is a web page"),
        ("notes.txt", "is a .txt file"),
    ):
        refused(LoraKitError, match, tmp_path / name, [adapter], tmp_path / "out.safetensors")


def test_weights_that_a_sum_cannot_be_written_in(base, tmp_path, adapter):
    state = load_file(base / UNET)
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in state.items()}, base / UNET)
    refused(ModelError, "stored as float8_e4m3fn.*Use --dtype", base, [adapter], tmp_path / "out")
    merge(base, [adapter], tmp_path / "out", MergeOptions(dtype=torch.float16))


def test_pickles_that_hold_more_than_tensors(base, tmp_path, adapter):
    (base / UNET).unlink()
    torch.save({"a": os.system}, base / "unet" / "diffusion_pytorch_model.bin")
    refused(ModelError, "could run foreign code: refused", base, [adapter], tmp_path / "out")


def test_a_network_that_is_not_the_adapted_one_is_taken_back(base, tmp_path, adapter, monkeypatch):
    from lora_kit.merging import network

    monkeypatch.setattr(network, "_add_in_place", lambda networks, updates: None)
    match = "the merged network differs from the adapted one"
    refused(ModelError, match, base, [adapter], tmp_path / "out", verify_network=True)


def test_a_wrong_weight_is_found_by_the_sample(base, tmp_path, adapter, monkeypatch):
    from lora_kit.merging import stream

    right = stream.delta

    def doubled(part, rows, dtype):
        found = right(part, rows, dtype)
        return found if found.up is None else found._replace(up=found.up * 1.001)

    monkeypatch.setattr(stream, "delta", doubled)
    refused(ModelError, "times further from its float64 value than rounding", base, [adapter], tmp_path / "out")
    merge(base, [adapter], tmp_path / "out", MergeOptions(verify=False))
