"""HF data sets that are streamed: the beginning is kept in the cache."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import datasets
import pytest
from PIL import Image
from pydantic import ValidationError

from lora_kit.data import Records, open_records
from lora_kit.data.pictures import read_picture
from lora_kit.errors import DataError
from lora_kit.recipe import DataSection


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


def jpeg(red: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(folder: Path, reds: range) -> Path:
    folder.mkdir(exist_ok=True)
    cells = [{"bytes": jpeg(red), "path": None} for red in reds]
    texts = [f"red {red}" for red in reds]
    kinds = ["odd" if red % 2 else "even" for red in reds]
    table = datasets.Dataset.from_dict({"image": cells, "text": texts, "kind": kinds})
    table.cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet")
    return folder


def records_of(folder: Path, **source: object) -> Records:
    whole = {"path": str(folder), "streaming": True, "max_records": 3, **source}
    return open_records(DataSection.model_validate({"sources": [whole]}))


def test_the_first_rows_are_read_and_no_more(tmp_path: Path) -> None:
    records = records_of(write(tmp_path / "set", range(8)))
    assert [(record.id, record.caption) for record in records] == [(f"set/row-{n}", f"red {n}") for n in range(3)]


def test_pictures_are_the_very_same_bytes(tmp_path: Path) -> None:
    records = records_of(write(tmp_path / "set", range(0, 250, 50)))
    for record, red in zip(records, (0, 50, 100), strict=True):
        expected = Image.open(BytesIO(jpeg(red))).convert("RGB")
        assert read_picture(record).image.tobytes() == expected.tobytes()


def test_a_second_start_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "set", range(8))
    first = [record.caption for record in records_of(folder)]
    calls: list[int] = []
    monkeypatch.setattr("lora_kit.data.sources.stream._embedded", lambda *_: calls.append(1))
    assert [record.caption for record in records_of(folder)] == first
    assert not calls


def test_a_changed_data_set_is_streamed_anew(tmp_path: Path) -> None:
    records_of(write(tmp_path / "set", range(8)))
    assert [record.caption for record in records_of(write(tmp_path / "set", range(4, 9)))] == [
        "red 4",
        "red 5",
        "red 6",
    ]


def test_where_picks_among_the_rows_that_were_read(tmp_path: Path) -> None:
    records = records_of(write(tmp_path / "set", range(8)), where={"kind": ["odd"]})
    assert [record.id for record in records] == ["set/row-1"]


def test_missing_columns_are_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'label' \(caption_column\)"):
        records_of(write(tmp_path / "set", range(4)), caption_column="label")


def test_streaming_needs_a_bound() -> None:
    with pytest.raises(ValidationError, match="needs `max_records`"):
        DataSection.model_validate({"sources": [{"path": "a", "streaming": True}]})
    with pytest.raises(ValidationError, match="does nothing without `streaming: true`"):
        DataSection.model_validate({"sources": [{"path": "a", "max_records": 3}]})


def test_a_folder_of_pictures_is_not_streamed(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"streaming does nothing with a folder of pictures"):
        records_of(tmp_path)
