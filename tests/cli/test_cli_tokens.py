"""Learned tokens on the command line: `generate`, `grid`, `convert`, `inspect`, `merge`, `plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_adapter_commands import run, tiny_state

from lora_kit.adapters import write_kohya
from lora_kit.adapters.token_files import Embedding, read_embedding, write_embedding

WIDTH = 160


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "toy.safetensors"
    write_embedding(path, Embedding("<toy>", torch.randn(2, WIDTH)), {})
    return path


def drawn(folder: Path) -> list[bytes]:
    found: list[bytes] = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as picture:
            found.append(picture.tobytes())
    return found


def test_generate_and_grid_say_the_token(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["tiny", "--steps", "1", "--size", "16x16", "--prompt", "a red <toy>"]
    assert run("generate", *options, "--out", tmp_path / "without") == 0
    assert run("generate", *options, "--embedding", words, "--out", tmp_path / "with") == 0
    assert drawn(tmp_path / "without") != drawn(tmp_path / "with")
    renamed = ["tiny", "--steps", "1", "--size", "16x16", "--prompt", "a red <cat>"]
    assert run("generate", *renamed, "--embedding", f"<cat>={words}", "--out", tmp_path / "renamed") == 0
    assert drawn(tmp_path / "renamed") == drawn(tmp_path / "with")
    with Image.open(next((tmp_path / "with").glob("*.png"))) as picture:
        assert json.loads(picture.info["embeddings"]) == ["toy.safetensors"]
    write_kohya(tmp_path / "a.safetensors", tiny_state(0))
    grid = ["grid", *options, "--adapter", tmp_path / "a.safetensors", "--scales", "0,1", "--embedding", words]
    assert run(*grid, "--out", tmp_path / "grid.png") == 0
    narrow = tmp_path / "narrow.safetensors"
    write_embedding(narrow, Embedding("<toy>", torch.randn(1, 8)), {})
    capsys.readouterr()
    assert run("generate", *options, "--embedding", narrow, "--out", tmp_path / "no") == 2
    assert f"its vectors are [1, 8]; the text encoder takes [{WIDTH}]" in capsys.readouterr().err


def test_tokens_in_an_adapter_are_shown_taken_out_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = torch.randn(2, WIDTH)
    write_kohya(tmp_path / "both.safetensors", tiny_state(0)._replace(embeddings={"<toy>": vectors}))
    assert run("inspect", tmp_path / "both.safetensors", "--base", "tiny") == 0
    assert "<toy>: [2, 160]" in capsys.readouterr().out
    convert = ["convert", tmp_path / "both.safetensors", "--base", "tiny", "--to"]
    assert run(*convert, "diffusers", "--out", tmp_path / "d.safetensors") == 2
    assert "which diffusers's layout does not hold" in capsys.readouterr().err
    options = ["--out", tmp_path / "d.safetensors", "--tokens", tmp_path / "words"]
    assert run(*convert, "diffusers", *options) == 0
    assert torch.equal(read_embedding(tmp_path / "words" / "toy.safetensors").vectors, vectors)
    assert not any("emb" in key for key in load_file(tmp_path / "d.safetensors"))
    assert run(*convert, "kohya", "--out", tmp_path / "k.safetensors") == 0
    kept = load_file(tmp_path / "k.safetensors")["bundle_emb.<toy>.string_to_param.*"]
    assert torch.equal(kept, vectors)
    capsys.readouterr()
    assert run("merge", "tiny", "--adapter", tmp_path / "both.safetensors", "--out", tmp_path / "merged") == 0
    assert "its learned tokens (<toy>) are no weights" in capsys.readouterr().out


def test_plan_names_the_tokens(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"data: {{sources: [{{path: {picture_folder}}}], resolution: 16, trigger: <toy>}}\n"
        "targets: none\n"
        "tokens: [{token: <toy>, initializer: cat, vectors: 4, until: 90}, {token: <hat>, lr: 0.001}]\n"
        "train: {max_steps: 100}\n"
    )
    assert run("plan", recipe) == 0
    said = capsys.readouterr().out
    assert "token <toy>: 4 vectors from cat, learning rate 0.0005, learned up to step 90" in said
    assert "token <hat>: 1 vector from random, learning rate 0.001" in said
    assert run("plan", recipe, "--json") == 0
    assert [one["lr"] for one in json.loads(capsys.readouterr().out)["tokens"]] == [0.0005, 0.001]
