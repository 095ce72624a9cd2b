"""Folders named `N_name`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lora_kit.data import Records, count_records, open_records
from lora_kit.errors import DataError
from lora_kit.recipe import DataSection


def section(folder: Path, **source: object) -> DataSection:
    return DataSection.model_validate({"sources": [{"path": str(folder), **source}], "on_error": "raise"})


def picture(path: Path, caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def found(records: Records) -> dict[str, tuple[str, int]]:
    return {record.id: (record.caption, record.repeats) for record in records}


@pytest.fixture
def train(tmp_path: Path) -> Path:
    picture(tmp_path / "train" / "10_sks cat" / "a.png", "a cat, sitting")
    picture(tmp_path / "train" / "10_sks cat" / "b.png")
    picture(tmp_path / "train" / "2_dog" / "c.png", "a dog")
    return tmp_path / "train"


EXPECTED = {
    "train/10_sks cat/a.png": ("a cat, sitting", 10),
    "train/10_sks cat/b.png": ("sks cat", 10),
    "train/2_dog/c.png": ("a dog", 2),
}


def test_repeats_and_fallback_come_from_the_names_and_a_notice_says_so(train: Path) -> None:
    records = open_records(section(train))
    assert found(records) == EXPECTED
    said = "read as N_name folders, N repeats each: 10_sks cat × 10: 2 pictures; 2_dog × 2: 1 pictures."
    assert said in records.notices[0]
    assert "`layout: plain`" in records.notices[0]
    assert count_records(section(train)) == 22


def test_plain_layout_reads_names_as_names(train: Path) -> None:
    picture(train / "10_sks cat" / "b.png", "another")
    assert {repeats for _, repeats in found(open_records(section(train, layout="plain"))).values()} == {1}


def test_repeats_of_the_source_multiply(train: Path) -> None:
    assert [record.repeats for record in open_records(section(train, repeats=3))] == [30, 30, 6]


def test_a_fallback_of_ones_own_goes_before_the_name(train: Path) -> None:
    records = open_records(section(train, caption_fallback="animal"))
    assert found(records)["train/10_sks cat/b.png"] == ("animal", 10)


@pytest.mark.parametrize("other", ["z.png", "portraits/z.png", "2024_summer/z.png", "0_none/z.png"])
def test_one_picture_elsewhere_and_the_folder_is_a_plain_one(train: Path, other: str) -> None:
    picture(train / "10_sks cat" / "b.png", "another")
    picture(train / other, "z")
    assert {record.repeats for record in open_records(section(train))} == {1}


def test_asked_for_pictures_elsewhere_are_left_out_and_named(train: Path) -> None:
    picture(train / "portraits" / "z.png", "z")
    records = open_records(section(train, layout="kohya"))
    assert found(records) == EXPECTED
    assert "pictures outside of N_name folders are left out: 1 (portraits/z.png)" in records.notices[-1]


def test_asked_for_without_such_folders_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "portraits" / "a.png", "a")
    with pytest.raises(DataError, match=r"no folder in it is named N_name, such as 10_cat.*It has: portraits"):
        open_records(section(tmp_path, layout="kohya"))


def test_a_regularisation_folder_is_a_source_that_says_so(tmp_path: Path) -> None:
    picture(tmp_path / "reg" / "1_cat" / "a.png")
    (record,) = open_records(section(tmp_path / "reg", regularisation=True))
    assert (record.caption, record.is_regularisation) == ("cat", True)


def test_a_project_with_img_and_reg(tmp_path: Path) -> None:
    picture(tmp_path / "cats" / "img" / "5_sks cat" / "a.png")
    picture(tmp_path / "cats" / "reg" / "1_cat" / "b.png")
    records = open_records(section(tmp_path / "cats"))
    assert found(records) == {"cats/img/5_sks cat/a.png": ("sks cat", 5), "cats/reg/1_cat/b.png": ("cat", 5)}
    assert [record.is_regularisation for record in records] == [False, True]


def test_broken_captions_are_flaws_all_the_same(train: Path) -> None:
    picture(train / "2_dog" / "d.png", " ")
    with pytest.raises(DataError, match=r"train/2_dog/d.png: no caption \(2_dog/d.txt is empty\)"):
        open_records(section(train))
