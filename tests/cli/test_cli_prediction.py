"""What a base predicts, on the command line: asked for where it matters and nowhere else, and never dropped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from adapter_samples import random_state
from merge_samples import networks_of, random_checkpoint
from PIL import Image
from safetensors.torch import save_file
from small_tokenizers import small_tokenizer

from lora_kit.adapters import write_kohya
from lora_kit.cli.main import main
from lora_kit.models import load_bundle, pipeline
from lora_kit.recipe import ModelSection

DRAW = ["--prompt", "red apple", "--size", "16x16", "--steps", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.safetensors, a small SD2 of which nothing tells what it predicts; a tokenizer; adapters with what their
    headers say; the same base as folders that say it."""
    folder = tmp_path_factory.mktemp("open")
    save_file(random_checkpoint(2), folder / "base.safetensors")
    small_tokenizer("!").save_pretrained(folder / "tokenizer")
    state = random_state(networks_of(folder / "base.safetensors"))
    headers = {
        "ours_v": {"lora_kit.family": "sd2", "lora_kit.scheduler": '{"prediction_type": "v_prediction"}'},
        "theirs_v": {"ss_base_model_version": "sd_v2_v"},
        "theirs_eps": {"ss_base_model_version": "sd_v2"},
        "silent": {},
    }
    for name, header in headers.items():
        write_kohya(folder / f"{name}.safetensors", state._replace(metadata=header))
    for predicts in ("epsilon", "v_prediction"):
        section = ModelSection(
            base=str(folder / "base.safetensors"), tokenizer=str(folder / "tokenizer"), prediction_type=predicts
        )
        pipeline(load_bundle(section)).save_pretrained(folder / predicts)
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def picture(folder: Path) -> tuple[bytes, dict[str, str]]:
    (path,) = folder.glob("*.png")
    with Image.open(path) as image:
        return image.tobytes(), dict(image.text)  # type: ignore[attr-defined]  # of a PNG


def generate(files: Path, base: str, out: Path, *options: object) -> int:
    tokenizer = ["--tokenizer", files / "tokenizer"] if base.endswith("safetensors") else []
    return run("generate", files / base, *DRAW, *tokenizer, "--out", out, *options)


def test_generate_asks_and_takes_the_answer(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(files, "base.safetensors", tmp_path / "none") == 2
    told = capsys.readouterr().err
    assert "for generate and grid that is --prediction-type" in told
    assert not (tmp_path / "none").exists()
    drawn = {}
    for predicts in ("epsilon", "v_prediction"):
        assert generate(files, "base.safetensors", tmp_path / predicts, "--prediction-type", predicts) == 0
        assert generate(files, predicts, tmp_path / f"{predicts}-folder") == 0
        drawn[predicts], about = picture(tmp_path / predicts)
        assert drawn[predicts] == picture(tmp_path / f"{predicts}-folder")[0]
        assert about["prediction_type"] == predicts
    assert drawn["epsilon"] != drawn["v_prediction"]


@pytest.mark.parametrize(
    ("adapter", "predicts"),
    [("ours_v", "v_prediction"), ("theirs_v", "v_prediction"), ("theirs_eps", "epsilon"), ("silent", None)],
)
def test_an_adapters_header_answers_for_the_base_it_was_trained_on(
    adapter: str, predicts: str | None, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = generate(files, "base.safetensors", tmp_path / "a", "--adapter", f"{files / adapter}.safetensors")
    said = capsys.readouterr().err
    if predicts is None:
        assert status == 2
        return
    assert status == 0
    assert f"base.safetensors does not tell what it predicts: taken for {predicts}, as " in said
    generate(files, predicts, tmp_path / "b", "--adapter", f"{files / adapter}.safetensors")
    assert picture(tmp_path / "a")[0] == picture(tmp_path / "b")[0]


def test_headers_that_disagree_answer_nothing(files: Path, tmp_path: Path) -> None:
    both = [word for name in ("theirs_v", "theirs_eps") for word in ("--adapter", f"{files / name}.safetensors")]
    assert generate(files, "base.safetensors", tmp_path / "a", *both) == 2


def test_an_answer_that_goes_over_the_bases_own_is_told(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(files, "v_prediction", tmp_path / "a", "--prediction-type", "epsilon") == 0
    assert "says that it predicts v_prediction; drawn as epsilon, as asked" in capsys.readouterr().err


def test_no_adapter_goes_over_what_was_asked(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = files / "ours_v.safetensors"
    assert generate(files, "epsilon", tmp_path / "a", "--adapter", adapter, "--prediction-type", "epsilon") == 0
    assert "was trained to predict v_prediction; pictures are drawn as epsilon, as asked" in capsys.readouterr().err
    drawn, about = picture(tmp_path / "a")
    assert about["prediction_type"] == "epsilon"
    generate(files, "epsilon", tmp_path / "b", "--adapter", files / "silent.safetensors")
    assert drawn == picture(tmp_path / "b")[0]


def test_grid_takes_it_too(files: Path, tmp_path: Path) -> None:
    options = ["--tokenizer", files / "tokenizer", "--scales", "1", "--out", tmp_path / "grid.png"]
    command = ["grid", files / "base.safetensors", "--adapter", files / "silent.safetensors", *DRAW, *options]
    assert run(*command) == 2
    assert run(*command, "--prediction-type", "v_prediction") == 0
    with Image.open(tmp_path / "grid.png") as image:
        assert image.text["prediction_type"] == "v_prediction"  # type: ignore[attr-defined]


def test_what_needs_no_answer_does_not_ask(files: Path, tmp_path: Path) -> None:
    """Nor for a tokenizer: only shapes and weights matter to these."""
    base, adapter = files / "base.safetensors", files / "silent.safetensors"
    merged = tmp_path / "merged.safetensors"
    assert run("merge", base, "--adapter", adapter, "--out", merged, "--verify-network") == 0
    assert run("merge", base, "--adapter", adapter, "--dry-run") == 0
    assert run("inspect", adapter, "--base", base) == 0
    assert run("convert", adapter, "--to", "diffusers", "--out", tmp_path / "b.safetensors", "--base", base) == 0
    assert run("extract", base, merged, "--rank", "4", "--out", tmp_path / "c.safetensors") == 0


def test_densifying_over_a_single_file_needs_neither(files: Path, tmp_path: Path) -> None:
    import torch

    from lora_kit.adapters import AdapterState
    from lora_kit.adapters.updates import build_update

    updates = random_state(networks_of(files / "base.safetensors")).updates
    name, update = next((name, one) for name, one in updates.items() if name.endswith("attn1.to_q"))
    width = update.parts()["up"].shape[0]
    blocks = {"oft_blocks": 0.1 * torch.randn(4, width // 4, width // 4, generator=torch.Generator().manual_seed(0))}
    write_kohya(tmp_path / "oft.safetensors", AdapterState({name: build_update(blocks, 0.0, (width, width))}, {}))
    command = ["convert", tmp_path / "oft.safetensors", "--to", "diffusers", "--densify", "--rank", "4"]
    assert run(*command, "--out", tmp_path / "b.safetensors", "--base", files / "base.safetensors") == 0


@pytest.mark.parametrize(
    ("base", "version", "predicts"), [("v_prediction", "sd_v2_v", "v"), ("epsilon", "sd_v2", "epsilon")]
)
def test_an_extracted_adapter_says_what_its_model_predicts(
    base: str, version: str, predicts: str, files: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open

    shutil.copytree(files / base, tmp_path / "base")
    merged = tmp_path / "tuned"
    assert run("merge", tmp_path / "base", "--adapter", files / "silent.safetensors", "--out", merged) == 0
    assert run("extract", tmp_path / "base", merged, "--rank", "4", "--out", tmp_path / "c.safetensors") == 0
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        told = file.metadata()
    assert (told["ss_base_model_version"], told["modelspec.prediction_type"]) == (version, predicts)
    assert told["lora_kit.scheduler"] == f'{{"prediction_type": "{base}"}}'


def test_a_combination_keeps_what_its_files_agree_on_and_tells_where_they_do_not(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import safe_open

    ours, theirs, other = (f"{files / name}.safetensors" for name in ("ours_v", "theirs_v", "theirs_eps"))
    alike, apart = tmp_path / "alike.safetensors", tmp_path / "apart.safetensors"
    assert run("combine", ours, ours, "--out", alike, "--base", files / "epsilon") == 0
    with safe_open(alike, "pt") as file:
        assert file.metadata()["lora_kit.scheduler"] == '{"prediction_type": "v_prediction"}'
    assert "different things" not in capsys.readouterr().out
    assert run("combine", theirs, other, "--out", apart, "--base", files / "epsilon") == 0
    said = capsys.readouterr().out
    assert "different things (theirs_v.safetensors v_prediction, theirs_eps.safetensors epsilon)" in said
    with safe_open(apart, "pt") as file:
        assert "ss_base_model_version" not in file.metadata()
