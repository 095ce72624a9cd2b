"""Captions in a `.json` file beside the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_kit.data import Records, open_records
from lora_kit.recipe import DataSection


def records_of(folder: Path, on_error: str = "skip", **source: object) -> Records:
    whole = {"sources": [{"path": str(folder), **source}], "on_error": on_error}
    return open_records(DataSection.model_validate(whole))


def sidecar(folder: Path, content: object, name: str = "a") -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    path = folder / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "caption", "captions"),
    [
        ({"caption": " a red ant\n"}, "a red ant", ()),
        ({"text": "ant"}, "ant", ()),
        ({"text": "ant", "tags": ["insect"]}, "ant", ()),
        ({"tags": "ant, red"}, "ant, red", ()),
        ({"tags": ["ant", " red "]}, "ant, red", ()),
        ({"captions": ["ant", "red ant"]}, "ant", ("ant", "red ant")),
        ({"caption": ["ant", "red ant"], "width": 8}, "ant", ("ant", "red ant")),
        ({"caption": "ant", "tags": []}, "ant", ()),
    ],
)
def test_the_one_key_in_use_is_the_caption(
    tmp_path: Path, content: object, caption: str, captions: tuple[str, ...]
) -> None:
    sidecar(tmp_path / "set", content)
    (record,) = records_of(tmp_path / "set")
    assert (record.caption, record.captions) == (caption, captions)


def test_caption_column_picks_the_key(tmp_path: Path) -> None:
    sidecar(tmp_path / "set", {"caption": "an ant", "tags": ["ant", "red"]})
    (record,) = records_of(tmp_path / "set", caption_column="tags")
    assert record.caption == "ant, red"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"caption": "ant", "tags": ["ant"]}, "a.json has caption and tags; say with caption_column which one"),
        ({"capton": "ant"}, "a.json has no 'text', caption, captions, tags"),
        ({"caption": 5}, "its caption is int, not text: 5"),
        ({"captions": ["ant", ""]}, "caption 2 of its list is not text: ''"),
        (["ant"], "a.json is not a JSON object with a caption, but list"),
        ("{", "a.json is not JSON"),
    ],
)
def test_what_is_no_caption_is_said(tmp_path: Path, content: object, reason: str) -> None:
    sidecar(tmp_path / "set", {"text": "bee"}, "b")
    sidecar(tmp_path / "set", content)
    records = records_of(tmp_path / "set")
    assert [record.caption for record in records] == ["bee"]
    assert reason in records.skipped[0].reason


def test_a_text_file_goes_before_json_and_says_so(tmp_path: Path) -> None:
    sidecar(tmp_path / "set", {"text": "from json"}).with_suffix(".txt").write_text("from text")
    records = records_of(tmp_path / "set")
    assert [record.caption for record in records] == ["from text"]
    assert "1 pictures have a text file and a .json file; the text is the caption (a.json)" in records.notices[0]


def test_caption_suffix_picks_json(tmp_path: Path) -> None:
    sidecar(tmp_path / "set", {"text": "from json"}).with_suffix(".txt").write_text("from text")
    (record,) = records_of(tmp_path / "set", caption_suffix=".json")
    assert record.caption == "from json"
