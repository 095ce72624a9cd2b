"""metadata.parquet and metadata files outside of the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from lora_kit.data import Records, open_records
from lora_kit.errors import DataError
from lora_kit.recipe import DataSection


def records_of(folder: Path, **source: object) -> Records:
    return open_records(DataSection.model_validate({"sources": [{"path": str(folder), **source}], "on_error": "raise"}))


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def write(path: Path, *rows: dict[str, object]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


ROWS = ({"file_name": "a.png", "text": "ant", "year": 1999}, {"file_name": "b.png", "text": "bee", "year": 2000})


def captions(records: Records) -> dict[str, str]:
    return {record.id: record.caption for record in records}


def test_parquet_is_read_as_jsonl_is(tmp_path: Path) -> None:
    write(pictures(tmp_path / "set", "a.png", "b.png") / "metadata.parquet", *ROWS)
    from_parquet = captions(records_of(tmp_path / "set"))
    (tmp_path / "set" / "metadata.parquet").unlink()
    (tmp_path / "set" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert from_parquet == captions(records_of(tmp_path / "set")) == {"set/a.png": "ant", "set/b.png": "bee"}


def test_where_compares_numbers_by_their_text(tmp_path: Path) -> None:
    write(pictures(tmp_path / "set", "a.png", "b.png") / "metadata.parquet", *ROWS)
    assert list(captions(records_of(tmp_path / "set", where={"year": ["1999"]}))) == ["set/a.png"]


def test_lists_of_captions(tmp_path: Path) -> None:
    write(pictures(tmp_path / "set", "a.png") / "metadata.parquet", {"file_name": "a.png", "text": ["ant", "insect"]})
    (record,) = records_of(tmp_path / "set")
    assert record.captions == ("ant", "insect")


def test_missing_column_names_all_there_are(tmp_path: Path) -> None:
    write(pictures(tmp_path / "set", "a.png") / "metadata.parquet", {"file_name": "a.png", "label": "ant"})
    with pytest.raises(DataError, match=r"no column 'text' \(caption_column\). Its columns: file_name, label"):
        records_of(tmp_path / "set")


def test_flaws_are_named_by_row(tmp_path: Path) -> None:
    row = {"file_name": "gone.png", "text": "ant"}
    write(pictures(tmp_path / "set", "a.png") / "metadata.parquet", {"file_name": "a.png", "text": "a"}, row)
    with pytest.raises(DataError, match=r"set/gone.png: the file is missing, and set/metadata.parquet row 1 names it"):
        records_of(tmp_path / "set")


def test_damaged_parquet(tmp_path: Path) -> None:
    (pictures(tmp_path / "set", "a.png") / "metadata.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"metadata.parquet cannot be read"):
        records_of(tmp_path / "set")


def test_metadata_file_lies_elsewhere(tmp_path: Path) -> None:
    pictures(tmp_path / "set", "a.png", "b.png", "c.png")
    records = records_of(tmp_path / "set", metadata_file=str(write(tmp_path / "captions.parquet", *ROWS)))
    assert captions(records) == {"set/a.png": "ant", "set/b.png": "bee"}
    assert records.notices[0].endswith("pictures that captions.parquet does not name are left out: 1 (c.png).")


def test_json_of_sd_scripts_tools(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "set", "a.png", "b.jpg", "c.png", "d.png")
    meta = {
        "a.png": {"caption": "an ant", "tags": "red, small"},
        "b": {"tags": "bee, yellow"},
        str(folder / "c.png"): {"caption": "a cat", "train_resolution": [512, 512]},
        "d": {"caption": "a dog\nsitting", "tags": "brown"},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    records = records_of(folder, metadata_file=str(tmp_path / "meta.json"))
    assert captions(records) == {
        "set/a.png": "an ant, red, small",
        "set/b.jpg": "bee, yellow",
        "set/c.png": "a cat",
        "set/d.png": "a dog, brown\nsitting, brown",
    }


def test_json_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "secret.png")
    (tmp_path / "meta.json").write_text(json.dumps({str(tmp_path / "secret.png"): {"caption": "a"}}))
    with pytest.raises(DataError, match=r"leaves the data folder"):
        records_of(pictures(tmp_path / "set", "a.png"), metadata_file=str(tmp_path / "meta.json"))
