"""Data sets that HF `datasets` reads, from local files."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from lora_kit.data import open_records
from lora_kit.data.pictures import read_picture
from lora_kit.errors import DataError
from lora_kit.recipe import DataSection

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


def section(path: Path | str, on_error: str = "raise", **source: object) -> DataSection:
    sources = [{"path": str(path), **source}]
    return DataSection.model_validate({"sources": sources, "resolution": 8, "on_error": on_error})


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def three(**columns: list[Any]) -> datasets.Dataset:
    """Three rows with an image column of embedded bytes."""
    cells = [{"bytes": png(colour), "path": None} for colour in COLOURS]
    whole = {"image": cells, "text": ["red", "green", "blue"], "kind": ["warm", "cold", "cold"], **columns}
    return datasets.Dataset.from_dict(whole).cast_column("image", datasets.Image())


def first_pixels(data: DataSection) -> dict[str, tuple[str, object]]:
    return {r.id: (r.caption, read_picture(r).image.getpixel((0, 0))) for r in open_records(data)}


EXPECTED = {
    "set/row-0": ("red", COLOURS[0]),
    "set/row-1": ("green", COLOURS[1]),
    "set/row-2": ("blue", COLOURS[2]),
}


def test_folder_with_parquet(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    three().to_parquet(tmp_path / "set" / "train.parquet")
    assert first_pixels(section(tmp_path / "set")) == EXPECTED


def test_parquet_file(tmp_path: Path) -> None:
    three().to_parquet(tmp_path / "set.parquet")
    found = first_pixels(section(tmp_path / "set.parquet"))
    assert list(found.values()) == list(EXPECTED.values())


def test_saved_to_disk(tmp_path: Path) -> None:
    three().save_to_disk(tmp_path / "set")
    assert first_pixels(section(tmp_path / "set")) == EXPECTED


def test_saved_splits(tmp_path: Path) -> None:
    datasets.DatasetDict(train=three(), test=three().select([2])).save_to_disk(tmp_path / "set")
    assert first_pixels(section(tmp_path / "set", split="test")) == {"set/row-0": ("blue", COLOURS[2])}


def test_unknown_saved_split(tmp_path: Path) -> None:
    datasets.DatasetDict(training=three()).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"no split 'train'. Its splits: training. Did you mean training\?"):
        open_records(section(tmp_path / "set"))


def test_json_table_with_paths(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.png").write_bytes(png(COLOURS[1]))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "inner/a.png", "text": "green"}) + "\n")
    assert first_pixels(section(tmp_path / "rows.jsonl")) == {"rows.jsonl/row-0": ("green", COLOURS[1])}


def test_column_of_plain_bytes(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    table = datasets.Dataset.from_dict({"picture": [png(COLOURS[0])], "label": ["red"]})
    table.to_parquet(tmp_path / "set" / "train.parquet")
    source = section(tmp_path / "set", image_column="picture", caption_column="label")
    assert first_pixels(source) == {"set/row-0": ("red", COLOURS[0])}


def test_ids_after_where_are_the_data_sets_rows(tmp_path: Path) -> None:
    three().save_to_disk(tmp_path / "set")
    found = first_pixels(section(tmp_path / "set", where={"kind": ["cold"]}))
    assert found == {key: EXPECTED[key] for key in ("set/row-1", "set/row-2")}


@pytest.mark.parametrize(("field", "default"), [("image_column", "image"), ("caption_column", "text")])
def test_missing_column(tmp_path: Path, field: str, default: str) -> None:
    three().save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=rf"no column '{default}s' \({field}\).*Did you mean {default}\?"):
        open_records(section(tmp_path / "set", **{field: f"{default}s"}))


def test_empty_caption_is_named_by_row(tmp_path: Path) -> None:
    three(text=["red", None, ""]).save_to_disk(tmp_path / "set")
    records = open_records(section(tmp_path / "set", on_error="skip"))
    reason = "no caption (column 'text' is empty)"
    assert records.skipped == [("set/row-1", reason), ("set/row-2", reason)]


def test_a_list_of_texts_is_several_captions(tmp_path: Path) -> None:
    three(text=[["red", "warm "], ["green"], ["blue", "cold"]]).save_to_disk(tmp_path / "set")
    records = open_records(section(tmp_path / "set"))
    assert [(record.caption, record.captions) for record in records] == [
        ("red", ("red", "warm")),
        ("green", ("green",)),
        ("blue", ("blue", "cold")),
    ]


def test_lists_of_captions_with_gaps_are_flaws(tmp_path: Path) -> None:
    three(text=[["red", None], [], ["blue"]]).save_to_disk(tmp_path / "set")
    records = open_records(section(tmp_path / "set", on_error="skip"))
    assert [record.caption for record in records] == ["blue"]
    assert records.skipped == [
        ("set/row-0", "caption 2 of its list is not text: None"),
        ("set/row-1", "no caption (column 'text' is empty)"),
    ]


def test_captions_that_are_numbers_are_refused(tmp_path: Path) -> None:
    three(text=[1, 2, 3]).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"set/row-0: its caption is int, not text"):
        open_records(section(tmp_path / "set"))


def test_paths_out_of_the_data_set_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(COLOURS[0]))
    (tmp_path / "set").mkdir()
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        (tmp_path / "set" / "rows.jsonl").write_text(json.dumps({"image": name, "text": "a"}) + "\n")
        (record,) = open_records(section(tmp_path / "set" / "rows.jsonl"))
        with pytest.raises(DataError, match=r"leaves the data set's folder"):
            read_picture(record)


def test_links_out_of_the_data_set_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(COLOURS[0]))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "secret.png")
    for name in ("a.png", str(tmp_path / "set" / "a.png")):
        (tmp_path / "set" / "rows.jsonl").write_text(json.dumps({"image": name, "text": "a"}) + "\n")
        (record,) = open_records(section(tmp_path / "set" / "rows.jsonl"))
        with pytest.raises(DataError, match=r"leaves the data set's folder"):
            read_picture(record)


def test_unknown_split_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    three().to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(DataError, match=r'Unknown split "trian". Should be one of \[.train.\]'):
        open_records(section(tmp_path / "set", split="trian"))


def test_neither_folder_nor_data_set_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder, and HF datasets cannot load a data set of that name"):
        open_records(section("nobody/nothing"), tmp_path)


def test_file_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"neither a folder nor a table. Tables end in .parquet"):
        open_records(section(tmp_path / "a.zip"))


def test_damaged_table(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"a\.parquet\): HF datasets cannot load it"):
        open_records(section(tmp_path / "a.parquet"))


def test_arrow_file(tmp_path: Path) -> None:
    """Of `save_to_disk` (Arrow's stream format), named alone."""
    three().save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.rename(tmp_path / "set.arrow")
    renamed = {name.replace("set/", "set.arrow/"): held for name, held in EXPECTED.items()}
    assert first_pixels(section(tmp_path / "set.arrow")) == renamed


def test_a_name_that_is_no_path_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str, data_files: object) -> datasets.Dataset:
        asked.append((name, config, split, data_files))
        return three(caption=["a", "b", "c"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = section("owner/set", config="small", split="test", caption_column="caption", where={"kind": ["cold"]})
    assert first_pixels(data) == {"owner/set/row-1": ("b", COLOURS[1]), "owner/set/row-2": ("c", COLOURS[2])}
    assert asked == [("owner/set", "small", "test", None)]
