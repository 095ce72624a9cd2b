"""`combine`, `resize`, `extract`, `diff`, `inspect` as a user runs them, on adapters of the packaged tiny base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_kit.adapters import AdapterState, LoraUpdate, Update, write_kohya
from lora_kit.algebra import open_adapters
from lora_kit.cli.main import main
from lora_kit.models.known_trees import known_trees
from lora_kit.models.loading import TINY_FOLDER

NAMES = [
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.mid_block.resnets.0.conv1",
    "unet.up_blocks.1.attentions.0.proj_in",
    "text_encoder.encoder.layers.0.mlp.fc1",
]


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def tiny_state(seed: int, rank: int = 4, names: list[str] | None = None) -> AdapterState:
    modules = {module.name: module for module in known_trees()["tiny"] if module.kind != "other"}
    generator = torch.Generator().manual_seed(seed)
    updates: dict[str, Update] = {}
    for name in NAMES if names is None else names:
        shape = modules[name].shape
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
        updates[name] = LoraUpdate(down, up, float(rank))
    return AdapterState(updates, {"ss_base_model_version": "sd_v1", "ss_tag_frequency": "{}"})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for seed, path in enumerate(paths):
        write_kohya(path, tiny_state(seed, rank=4 + seed))
    return paths


def deltas(path: Path) -> dict[str, torch.Tensor]:
    (opened,) = open_adapters([path], "tiny")
    found = {name: update.weight_delta(1.0, None, torch.float64) for name, update in opened.state.updates.items()}
    return {name: delta for name, delta in found.items() if delta is not None}


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_combine_half_and_half_is_exact_to_1e_6(files: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.safetensors"
    assert run("combine", f"{files[0]}:0.5", f"{files[1]}:0.5", "--out", out, "--json") == 0
    told = document(capsys)
    assert told["total"]["modules"] == 4
    assert told["total"]["relative_error"] < 1e-6
    one, other, both = (deltas(path) for path in (*files, out))
    for name in NAMES:
        exact = 0.5 * one[name] + 0.5 * other[name]
        assert float((both[name] - exact).norm() / exact.norm()) < 1e-6
    (opened,) = open_adapters([out], "tiny")
    record = json.loads(opened.state.metadata["lora_kit.combined"])
    assert [source["weight"] for source in record["sources"]] == [0.5, 0.5]
    assert [source["sha256"] for source in record["sources"]] == [one.sha256 for one in open_adapters(list(files))]
    assert opened.state.metadata["ss_base_model_version"] == "sd_v1"
    assert opened.state.metadata["ss_network_dim"] == "9"
    assert "ss_tag_frequency" not in opened.state.metadata


def test_combine_at_a_rank_tells_what_it_lost(files: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.safetensors"
    assert run("combine", *files, "--out", out, "--method", "svd", "--rank", "3") == 0
    text = capsys.readouterr().out
    assert "9 → 3" in text
    assert "in all: 4 modules, kept energy 0." in text
    assert "unet.mid_block.resnets.0.conv1" in text
    assert {update.rank for update in open_adapters([out])[0].state.updates.values()} == {3}


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_combine_entry_by_entry(files: tuple[Path, Path], tmp_path: Path, capsys, method: str) -> None:
    outs = [tmp_path / f"{index}.safetensors" for index in range(2)]
    for out in outs:
        arguments = [*files, "--out", out, "--method", method, "--rank", "8", "--density", "0.3", "--seed", "5"]
        assert run("combine", *arguments) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert "dense → 8" in capsys.readouterr().out
    assert run("combine", *files, "--out", tmp_path / "x.safetensors", "--method", method) == 2
    assert "--rank N, or --keep E" in capsys.readouterr().err


def test_resize_by_rank_and_by_energy(files: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    out, kept = tmp_path / "out.safetensors", tmp_path / "kept.safetensors"
    assert run("resize", files[0], "--rank", "2", "--out", out) == 0
    assert "4 → 2" in capsys.readouterr().out
    assert run("resize", files[0], "--keep", "0.8", "--out", kept, "--json") == 0
    assert all(row["kept_energy"] >= 0.8 for row in document(capsys)["modules"])
    (opened,) = open_adapters([out])
    assert opened.state.metadata["ss_network_dim"] == "2"
    assert json.loads(opened.state.metadata["lora_kit.resized"])["rank"] == 2
    assert opened.state.metadata["ss_tag_frequency"] == "{}"


def test_learned_tokens_are_named_when_they_are_left_out(tmp_path: Path, capsys) -> None:
    """A file of cloneofsimo/lora's with a token beside the text encoder's updates."""
    width = next(module.shape[0] for module in known_trees()["tiny"] if module.name.endswith("self_attn.q_proj"))
    layers = sum(module.name.endswith("self_attn.q_proj") for module in known_trees()["tiny"])
    tensors = {"<s1>": torch.ones(width)}
    for index in range(4 * layers):
        tensors[f"text_encoder:{index}:up"] = torch.ones(width, 2)
        tensors[f"text_encoder:{index}:down"] = torch.ones(2, width)
    metadata = {"text_encoder": '["CLIPAttention"]', "<s1>": "<embed>"}
    metadata |= {f"text_encoder:{index}:rank": "2" for index in range(4 * layers)}
    save_file(tensors, tmp_path / "tokens.safetensors", metadata)
    assert run("inspect", tmp_path / "tokens.safetensors", "--base", "tiny") == 0
    assert "<s1>: [" in capsys.readouterr().out
    arguments = ["--rank", "1", "--out", tmp_path / "out.safetensors", "--base", "tiny"]
    assert run("resize", tmp_path / "tokens.safetensors", *arguments) == 0
    assert "its learned tokens (<s1>) are left out" in capsys.readouterr().out


def test_commands_overwrite_nothing_unless_asked(files: tuple[Path, Path], capsys) -> None:
    before = files[1].read_bytes()
    assert run("resize", files[0], "--rank", "2", "--out", files[1]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run("combine", *files, "--out", files[1]) == 2
    assert run("extract", "tiny", "tiny", "--rank", "2", "--out", files[1]) == 2
    assert files[1].read_bytes() == before
    assert run("resize", files[0], "--rank", "2", "--out", files[1], "--overwrite") == 0


def test_resize_without_a_size_or_with_a_wrong_file(files: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.safetensors"
    assert run("resize", files[0], "--out", out) == 2
    assert "give --rank N, or --keep E" in capsys.readouterr().err
    assert run("resize", tmp_path / "none.safetensors", "--rank", "2", "--out", out) == 2
    tensors = load_file(files[0])
    tensors["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"] = torch.ones(7, 4, 1, 1)
    save_file(tensors, tmp_path / "odd.safetensors")
    assert run("resize", tmp_path / "odd.safetensors", "--rank", "2", "--out", out) == 2
    said = capsys.readouterr().err
    assert "lora_unet_mid_block_resnets_0_conv1: down" in said
    assert "this is what tiny says" in said
    assert not out.exists()


def test_extract_finds_what_was_added(tmp_path: Path, capsys) -> None:
    tuned, out = tmp_path / "tuned", tmp_path / "out.safetensors"
    shutil.copytree(TINY_FOLDER, tuned)
    (file,) = (tuned / "unet").glob("*.safetensors")
    weights = load_file(file)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    weights[key] = (weights[key].float() + 0.25).to(weights[key].dtype)
    weights["conv_in.bias"] = weights["conv_in.bias"] + 1
    save_file(weights, file)
    assert run("extract", "tiny", tuned, "--rank", "1", "--out", out) == 0
    text = capsys.readouterr().out
    assert "dense → 1" in text
    assert "changed but left out" in text
    assert "unet.conv_in.bias" in text
    (found,) = deltas(out).values()
    before = load_file(next((TINY_FOLDER / "unet").glob("*.safetensors")))[key]
    assert torch.allclose(found, weights[key].double() - before.double(), atol=1e-3)


def test_diff_reads_two_layouts_without_a_base(files: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    """The same updates as kohya and as diffusers would write them (alpha = rank), one module fewer."""
    other = tmp_path / "pytorch_lora_weights.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, update in tiny_state(0).updates.items():
        if name == NAMES[0]:
            continue
        assert isinstance(update, LoraUpdate)
        spelled = name.replace("text_encoder.", "text_encoder.text_model.")
        tensors |= {f"{spelled}.lora_A.weight": update.down, f"{spelled}.lora_B.weight": update.up}
    save_file(tensors, other)
    assert run("diff", files[0], other, "--json") == 0
    found = document(capsys)
    assert found["only_first"] == [NAMES[0]]
    assert found["only_second"] == []
    assert sorted(row["module"] for row in found["modules"]) == sorted(NAMES[1:])
    for row in [*found["modules"], found["in_all"]]:
        assert row["cosine"] == pytest.approx(1.0, abs=1e-12)
        assert row["ratio"] == pytest.approx(1.0, rel=1e-12)
        assert row["difference"] == pytest.approx(0.0, abs=1e-12 * row["first_norm"])


def test_diff_for_the_eye(files: tuple[Path, Path], capsys) -> None:
    assert run("diff", *files) == 0
    text = capsys.readouterr().out
    assert "4 modules in both, 0 only in A, 0 only in B" in text
    assert "in all" in text
    assert run("diff", files[0], files[0]) == 0
    assert "+1.00000  1 " in capsys.readouterr().out


def test_adapters_of_different_bases_do_not_go_together(files: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    other = tmp_path / "sd1.safetensors"
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    write_kohya(other, AdapterState({name: LoraUpdate(torch.ones(2, 768), torch.ones(1280, 2), 2.0)}, {}))
    assert run("diff", files[0], other) == 2
    said = capsys.readouterr().err
    assert "different bases" in said
    assert f"{other} belongs to sd1" in said


def test_inspect_tells_layout_base_blocks_ranks_and_header(files: tuple[Path, Path], capsys) -> None:
    assert run("inspect", files[0]) == 0
    text = capsys.readouterr().out
    for wanted in ("kohya layout, 4 modules", "fit tiny", "UNet: 3 × lora, rank 4, alpha 4, float32", "unet mid"):
        assert wanted in text
    assert "ss_base_model_version: sd_v1" in text
    assert run("inspect", files[0], "--json") == 0
    found = document(capsys)
    assert found["fits"] == "tiny"
    assert sum(block["share"] for block in found["blocks"]) == pytest.approx(1.0)
    assert {row["module"] for row in found["modules"]} == set(NAMES)
    assert all(len(row["singular_values"]) == 4 for row in found["modules"])


def test_inspect_shows_an_adapter_of_a_base_that_it_does_not_know(tmp_path: Path, capsys) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(
        {"lora_unet_odd.lora_down.weight": torch.ones(2, 5), "lora_unet_odd.lora_up.weight": torch.ones(3, 2)}, path
    )
    assert run("inspect", path) == 0
    text = capsys.readouterr().out
    assert "none that is known by heart" in text
    assert "lora_unet_odd" in text


def test_inspect_draws_a_picture(files: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    picture = tmp_path / "look.png"
    assert run("inspect", files[0], "--plot", picture) == 0
    with Image.open(picture) as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 20
    before = picture.read_bytes()
    assert run("inspect", files[0], "--plot", picture) == 2
    assert picture.read_bytes() == before
