"""`lora-kit plan` of a recipe with `train.compile`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_kit.cli.main import main


@pytest.fixture
def recipe(tiny_sd1_folder: Path, make_picture_folder, tmp_path: Path) -> Path:
    pictures = make_picture_folder(tmp_path / "pictures", count=3)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{base: {tiny_sd1_folder}}}\n"
        f"data: {{sources: [{{path: {pictures}}}], resolution: 16, batch_size: 3}}\n"
        "train: {compile: true, micro_batch_size: 2}\n"
    )
    return path


def planned(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    return int(ended.value.code or 0)


def test_what_is_compiled_is_told(recipe, capsys):
    assert planned(str(recipe)) == 0
    said = capsys.readouterr().out
    # The small base: a resnet a level down, two up, two in the middle; micro-batches of two pictures and of one.
    assert "compile: " in said
    assert "8 resnets" in said
    assert "for 2 shapes of micro-batches" in said
    assert planned(str(recipe), "train.compile=false") == 0
    assert "compile: " not in capsys.readouterr().out


def test_json_counts_the_pieces(recipe, capsys):
    assert planned(str(recipe), "--json") == 0
    found = json.loads(capsys.readouterr().out)["compile"]
    assert found["shapes"] == 2
    assert found["pieces"] == 2 * found["different"]
    assert planned(str(recipe), "train.compile=false", "--json") == 0
    assert json.loads(capsys.readouterr().out)["compile"] is None
