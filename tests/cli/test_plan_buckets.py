"""`lora-kit plan` on pictures of several shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from lora_kit.cli.main import main

SIZES = [(40, 24), (24, 40), (40, 24), (32, 32), (16, 20)]
BUCKETS = {"step": 8}


@pytest.fixture
def recipe(tiny_sd1_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for index, size in enumerate(SIZES):
        Image.new("RGB", size).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text("a cat")
    data = {"sources": [{"path": "pictures"}], "resolution": 32, "batch_size": 2, "buckets": BUCKETS}
    sections: dict[str, Any] = {
        "model": {"base": str(tiny_sd1_folder)},
        "targets": {"preset": "attention", "rank": 2},
        "data": data,
        "train": {"max_steps": 12},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(sections))  # JSON is YAML
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_json_has_every_bucket(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(recipe), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    plan = document["buckets"]
    assert {key: plan[key] for key in ("pictures", "unreadable", "samples", "steps")} == {
        "pictures": 5,
        "unreadable": 0,
        "samples": 5,
        "steps": 4,
    }
    rows = [(b["width"], b["height"], b["pictures"], b["steps"], b["wrapped"], b["lowered"]) for b in plan["buckets"]]
    # 16 × 20 is smaller than the square of 32: the largest smaller bucket that it fills is the square of 16.
    assert rows == [(16, 16, 1, 1, 1, 1), (24, 40, 1, 1, 1, 0), (40, 24, 2, 1, 0, 0), (32, 32, 1, 1, 1, 0)]
    assert plan["buckets"][0]["mean_crop"] == plan["buckets"][0]["largest_crop"] == pytest.approx(20)
    assert document["steps"]["samples_per_epoch"] == 5
    assert document["steps"]["epochs"] == 3.0  # 12 steps of 4 each


def test_table_says_what_an_epoch_is(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(recipe)) == 0
    shown = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line.split() for line in shown.splitlines()}
    assert rows["40 × 24"][3:] == ["2", "2", "1", "0.0", "%", "0.0", "%"]
    assert rows["16 × 16"][3:] == ["1", "1", "1", "1", "20.0", "%", "20.0", "%"]
    assert rows["in an epoch"][3:] == ["5", "5", "3", "4", "4.0", "%", "20.0", "%"]
    assert "once more" in shown
    assert "which go to a smaller one: 1" in shown
    assert "steps: 12 of 2 pictures; 3 epochs of 5 samples" in shown


def test_short_steps_are_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(recipe), "data.buckets.short=short") == 0
    assert "short of" in capsys.readouterr().out


def test_a_plan_reads_headers_only(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(ImageFile.ImageFile, "load", unwanted)
    (recipe.parent / "pictures" / "4.png").write_bytes(b"no picture")
    assert run(str(recipe)) == 0
    assert "pictures that cannot be read, counted as squares: 1 (pictures/4.png)" in capsys.readouterr().out


def test_squares_of_one_size_have_no_plan_of_buckets(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(recipe), "data.buckets=null", "--json") == 0
    assert json.loads(capsys.readouterr().out)["buckets"] is None
