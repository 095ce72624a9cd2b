"""Adapters of LDM text-to-image on the command line: what holds them, what tells of them, which bases refuse them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_samples import bundle_of, random_state
from safetensors import safe_open

from lora_kit.adapters import AdapterState, LoraUpdate, read_adapter, write_adapter, write_kohya
from lora_kit.algebra import open_adapters
from lora_kit.cli.main import main
from lora_kit.models.known_trees import known_trees

HEADER = {"lora_kit.family": "ldm_text2im"}
NAMES = [
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.down_blocks.0.resnets.0.conv1",
    "text_encoder.model.layers.1.fc1",
    "text_encoder.model.layers.1.self_attn.q_proj",
]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, said.out, said.err


def small_state(header: dict[str, str], seed: int = 0) -> AdapterState:
    """Over NAMES of the published base, so that no base need be named."""
    modules = {module.name: module for module in known_trees()["ldm_text2im"]}
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name in NAMES:
        out, *inputs = modules[name].shape
        down = torch.randn(2, *inputs, generator=generator)
        updates[name] = LoraUpdate(down, torch.randn(out, 2, *(1 for _ in inputs[1:]), generator=generator), 2.0)
    return AdapterState(updates, header)


@pytest.fixture(params=[HEADER, {}], ids=["header", "no header"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "ldm.safetensors"
    write_adapter(path, small_state(request.param), "diffusers")
    return path


def test_convert_says_why_there_is_no_kohya_file(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "convert", published, "--to", "kohya", "--out", tmp_path / "kohya.safetensors")
    assert code == 2
    assert "kohya's layout has no names for ldm_text2im" in err
    assert "`diffusers` or `peft`" in err
    assert not (tmp_path / "kohya.safetensors").exists()


def test_converting_to_peft_and_back_keeps_every_bit(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "convert", published, "--to", "peft", "--out", tmp_path / "peft")[0] == 0
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == ["text_encoder", "unet"]
    back = tmp_path / "back.safetensors"
    assert run(capsys, "convert", tmp_path / "peft", "--to", "diffusers", "--out", back)[0] == 0
    (first,), (second,) = open_adapters([published]), open_adapters([back])
    assert first.state.updates.keys() == second.state.updates.keys() == set(NAMES)
    for name, update in first.state.updates.items():
        other = second.state.updates[name]
        assert update.alpha == other.alpha
        assert all(torch.equal(part, other.parts()[key]) for key, part in update.parts().items())


def test_inspect_names_the_family_and_the_text_encoders_layers(
    published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "inspect", published, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["fits"] == "ldm_text2im"
    assert found["family"] == found["metadata"].get("lora_kit.family")
    blocks = {block["block"]: block["modules"] for block in found["blocks"]}
    assert blocks == {"text encoder 1": 2, "unet down 0": 1, "unet mid": 1}


@pytest.mark.parametrize("command", ["combine", "resize"])
def test_what_is_made_of_its_files_is_a_diffusers_file_again(
    command: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    given = [published, published] if command == "combine" else [published, "--rank", "1"]
    assert run(capsys, command, *given, "--out", out)[0] == 0
    (opened,) = open_adapters([out])
    assert (opened.layout, opened.base) == ("diffusers", "ldm_text2im")
    assert opened.state.updates.keys() == set(NAMES)


def test_the_difference_of_two_bases_is_a_diffusers_file_that_names_the_family(
    tiny_text2im_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    state = random_state(bundle_of(tiny_text2im_folder).components)
    write_adapter(adapter, state._replace(metadata=HEADER), "diffusers")
    assert run(capsys, "merge", tiny_text2im_folder, "--adapter", adapter, "--out", tmp_path / "tuned")[0] == 0
    assert run(capsys, "extract", tiny_text2im_folder, tmp_path / "tuned", "--rank", "2", "--out", out)[0] == 0
    with safe_open(str(out), "pt") as file:
        assert file.metadata()["lora_kit.family"] == "ldm_text2im"
    found = read_adapter(out, bundle_of(tiny_text2im_folder).components).updates
    assert found.keys() == state.updates.keys()


@pytest.fixture
def files(tiny_text2im_folder: Path, tiny_sd1_folder: Path, tmp_path: Path) -> dict[str, tuple[Path, Path]]:
    """Family → its base, and an adapter of it."""
    ldm, sd1 = tmp_path / "of-ldm.safetensors", tmp_path / "of-sd1.safetensors"
    write_adapter(ldm, random_state(bundle_of(tiny_text2im_folder).components)._replace(metadata=HEADER), "diffusers")
    write_kohya(sd1, random_state(bundle_of(tiny_sd1_folder).components)._replace(metadata={"lora_kit.family": "sd1"}))
    return {"ldm_text2im": (tiny_text2im_folder, ldm), "sd1": (tiny_sd1_folder, sd1)}


@pytest.mark.parametrize(("own", "other"), [("ldm_text2im", "sd1"), ("sd1", "ldm_text2im")])
def test_another_familys_adapter_is_refused_with_both_named_and_the_first_shapes(
    own: str,
    other: str,
    files: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    picture_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter = files[own][0], files[other][1]
    recipe = {
        "model": {"base": str(base), "adapter": str(adapter)},
        "data": {"sources": [{"path": str(picture_folder)}], "resolution": 64},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    commands: list[list[object]] = [
        ["generate", base, "--adapter", adapter, "--prompt", "red apple", "--out", tmp_path / "pictures"],
        ["merge", base, "--adapter", adapter, "--out", tmp_path / "merged"],
        ["convert", adapter, "--base", base, "--to", "diffusers", "--out", tmp_path / "converted.safetensors"],
        ["plan", tmp_path / "recipe.yaml"],
        ["train", tmp_path / "recipe.yaml"],
    ]
    for command in commands:
        code, _, err = run(capsys, *command)
        assert code == 2, command
        assert f"was trained on {other}" in err, command
        called = "the recipe's base" if command[0] in ("plan", "train") else base
        assert f"{called} is {own}" in err, command
        assert "do not fit the module's weight [" in err, err
    assert not any((tmp_path / name).exists() for name in ("pictures", "merged", "converted.safetensors"))
