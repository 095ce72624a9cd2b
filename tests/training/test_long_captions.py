"""Captions longer than the text encoder reads, in a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_kit.recipe import Recipe
from lora_kit.training import train
from lora_kit.training.build import build_run
from lora_kit.training.processes.launch import build_accelerator

LONG = "apple " * 80
TOLD = "captions are longer than the text encoder reads; cut off."


@pytest.fixture
def pictures(tmp_path: Path, make_picture_folder: Callable[..., Path]) -> Path:
    """Four pictures: one caption fits, one has 80 tokens, one twice that, one's second caption 80."""
    folder = make_picture_folder(tmp_path / "pictures", count=4)
    captions = ["red apple", LONG, LONG + LONG, ["blue boat", LONG]]
    rows = [{"file_name": f"{index:03d}.png", "text": text} for index, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_captions_that_are_cut_are_counted(make_recipe: Callable[..., Recipe], pictures: Path) -> None:
    recipe = make_recipe(pictures=pictures)
    found = build_run(recipe, build_accelerator(recipe)).notices
    assert [notice for notice in found if TOLD in notice] == [f"3 of 5 {TOLD}"]


def test_a_run_in_chunks_cuts_none(
    make_recipe: Callable[..., Recipe], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_recipe("data.captions.long=chunks", "train.max_steps=1", pictures=pictures))
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert math.isfinite(json.loads(line)["loss"])
    assert TOLD not in capsys.readouterr().err
