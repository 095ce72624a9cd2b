"""Folders of pictures: metadata tables and sidecar files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_kit.data import Records, count_records, open_records
from lora_kit.errors import DataError
from lora_kit.recipe import DataSection, SourceSection


def section(*sources: Path | dict[str, object], **fields: object) -> DataSection:
    whole = [{"path": str(s)} if isinstance(s, Path) else {**s, "path": str(s["path"])} for s in sources]
    return DataSection.model_validate({"sources": whole, "resolution": 16, **fields})


def picture(path: Path, colour: tuple[int, int, int] = (10, 20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)
    return path


def table(folder: Path, *rows: dict[str, object]) -> Path:
    """A folder with metadata.jsonl; a picture is made for each file_name that lies in it."""
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for row in rows:
        if ".." not in str(row["file_name"]):
            picture(folder / str(row["file_name"]))
    return folder


def captions(records: Records) -> dict[str, str]:
    return {record.id: record.caption for record in records}


def test_metadata_jsonl(tmp_path: Path) -> None:
    folder = table(tmp_path / "line", {"file_name": "b.png", "text": "bee"}, {"file_name": "x/a.png", "text": " ant\n"})
    assert captions(open_records(section(folder))) == {"line/b.png": "bee", "line/x/a.png": "ant"}


def test_line_separator_within_a_caption_does_not_end_the_row(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    picture(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a\u2028b"}\n', encoding="utf-8")
    assert captions(open_records(section(folder))) == {"set/a.png": "a\u2028b"}


def test_metadata_csv_with_other_caption_column(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    picture(folder / "a.png")
    (folder / "metadata.csv").write_text('\ufefffile_name,label\na.png,"cat, sitting\nstill"\n', encoding="utf-8")
    records = open_records(section({"path": folder, "caption_column": "label"}))
    assert captions(records) == {"set/a.png": "cat, sitting\nstill"}


def test_csv_caption_with_an_unquoted_comma_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    picture(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,text\na.png,cat, sitting\n")
    with pytest.raises(DataError, match=r"set/metadata.csv line 2: 3 fields where the header has 2. Put quotes"):
        open_records(section(folder))


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_sidecars_in_nested_folders(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "set"
    picture(folder / "a.PNG").with_suffix(suffix).write_text("ant\n")
    picture(folder / "deep" / "er" / "b.v1.jpg").with_suffix(suffix).write_text("bee")
    assert captions(open_records(section(folder))) == {"set/a.PNG": "ant", "set/deep/er/b.v1.jpg": "bee"}


def test_hidden_files_are_no_part_of_the_set(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    picture(folder / "a.png").with_suffix(".txt").write_text("ant")
    picture(folder / ".thumbnails" / "a.png")
    (folder / "._a.png").write_bytes(b"resource fork")
    assert list(captions(open_records(section(folder)))) == ["set/a.png"]


def test_sources_of_one_name_get_ids_of_their_own(tmp_path: Path) -> None:
    first = table(tmp_path / "set", {"file_name": "a.png", "text": "one"})
    (tmp_path / "other").mkdir()
    second = table(tmp_path / "other" / "set", {"file_name": "a.png", "text": "two"})
    records = open_records(section(first, second))
    assert captions(records) == {"set@0/a.png": "one", "set@1/a.png": "two"}
    assert [record.source for record in records] == [0, 1]


def test_relative_paths_resolve_against_the_given_folder(tmp_path: Path) -> None:
    table(tmp_path / "set", {"file_name": "a.png", "text": "ant"})
    assert len(open_records(section(Path("set")), tmp_path)) == 1


def test_count_is_records_times_repeats_and_opens_no_picture(tmp_path: Path) -> None:
    first = table(tmp_path / "one", {"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b"})
    second = table(tmp_path / "two", {"file_name": "c.png", "text": "c"})
    (second / "c.png").write_bytes(b"not a picture")
    assert count_records(section({"path": first, "repeats": 3}, second)) == 7


def test_where_keeps_matching_rows_and_excuses_the_others(tmp_path: Path) -> None:
    rows = ({"file_name": "a.png", "text": "a", "year": 1999}, {"file_name": "b.png", "text": "", "year": 2000})
    records = open_records(section({"path": table(tmp_path / "set", *rows), "where": {"year": ["1999"]}}))
    assert list(captions(records)) == ["set/a.png"]


def test_where_on_an_unknown_column(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", {"file_name": "a.png", "text": "a", "kind": "thing"})
    with pytest.raises(DataError, match=r"no column 'knd' \(where\).*file_name, kind, text.* Did you mean kind\?"):
        open_records(section({"path": folder, "where": {"knd": ["thing"]}}))


def test_where_that_keeps_nothing(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", {"file_name": "a.png", "text": "a", "kind": "thing"})
    with pytest.raises(DataError, match=r"where kind = \['thinn'\] keeps nothing. It has: thing. Did you mean thing"):
        open_records(section({"path": folder, "where": {"kind": ["thinn"]}}))


def test_where_needs_a_table(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("ant")
    with pytest.raises(DataError, match=r"where needs columns"):
        open_records(section({"path": tmp_path, "where": {"kind": ["thing"]}}))


def test_missing_caption_column(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", {"file_name": "a.png", "txt": "a"})
    with pytest.raises(DataError, match=r"no column 'text' \(caption_column\).*Did you mean txt\?"):
        open_records(section(folder))


def test_missing_file_name_column(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"filename": "a.png", "text": "a"}\n')
    with pytest.raises(DataError, match=r"no column 'file_name'.*Did you mean filename\?"):
        open_records(section(tmp_path))


def test_missing_folder_says_where_it_looked(tmp_path: Path) -> None:
    (tmp_path / "data" / "openmoji").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        open_records(section(Path("data/openmojo")), tmp_path)
    assert str(tmp_path / "data" / "openmojo") in str(caught.value)
    assert "relative to the recipe's folder" in str(caught.value)
    assert str(caught.value).endswith("Did you mean openmoji?")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no captioned picture in it\. Looked for .*\.png"):
        open_records(section(tmp_path))


def test_folder_with_pictures_of_foreign_formats_only_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"files that Pillow does not read are left out: 1 \.heic"):
        open_records(section(tmp_path))


@pytest.mark.parametrize("name", ["../secret.png", "x/../../secret.png", "/etc/secret.png"])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "secret.png")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    with pytest.raises(DataError, match=r"set/metadata.jsonl line 1: file_name .* leaves the data folder"):
        open_records(section(folder))


@pytest.mark.parametrize("name", ["a.png", "inner/secret.png"])
def test_metadata_that_leads_through_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "elsewhere" / "secret.png")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (folder / "inner").symlink_to(tmp_path / "elsewhere")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    with pytest.raises(DataError, match=rf"set/{name}: a link leads out of the data folder"):
        open_records(section(folder))


def test_links_within_the_folder_are_read(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", {"file_name": "a.png", "text": "a"})
    (folder / "b.png").symlink_to(folder / "a.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "b.png", "text": "b"}))
    assert captions(open_records(section(folder))) == {"set/b.png": "b"}


def test_linked_pictures_without_metadata_are_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(picture(tmp_path / "elsewhere" / "a.png"))
    (tmp_path / "set" / "a.txt").write_text("ant")
    assert captions(open_records(section(tmp_path / "set"))) == {"set/a.png": "ant"}


def test_a_list_in_metadata_is_several_captions(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", {"file_name": "a.png", "text": ["ant", "insect"]})
    (record,) = open_records(section(folder))
    assert (record.caption, record.captions) == ("ant", ("ant", "insect"))


def test_fallback_stands_in_for_missing_captions(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.png")
    picture(tmp_path / "set" / "b.png").with_suffix(".txt").write_text("bee")
    records = open_records(section({"path": tmp_path / "set", "caption_fallback": "insect"}))
    assert captions(records) == {"set/a.png": "insect", "set/b.png": "bee"}


def test_a_suffix_of_ones_own_picks_the_caption_file(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.png").with_suffix(".txt").write_text("short")
    (tmp_path / "set" / "a-long.txt").write_text("long")
    records = open_records(section({"path": tmp_path / "set", "caption_suffix": "-long.txt"}))
    assert captions(records) == {"set/a.png": "long"}


def test_inner_folders_can_be_left_out(tmp_path: Path) -> None:
    for name in ("a", "inner/b"):
        picture(tmp_path / "set" / f"{name}.png").with_suffix(".txt").write_text(name)
    assert captions(open_records(section({"path": tmp_path / "set", "nested": False}))) == {"set/a.png": "a"}


def test_a_source_says_what_its_pictures_are_for(tmp_path: Path) -> None:
    first = table(tmp_path / "one", {"file_name": "a.png", "text": "a"})
    second = {"path": table(tmp_path / "two", {"file_name": "b.png", "text": "b"}), "regularisation": True}
    records = open_records(section(first, {**second, "loss_weight": 0.5, "alpha": "mask"}, alpha="black"))
    found = [(record.is_regularisation, record.loss_weight, record.alpha) for record in records]
    assert found == [(False, 1.0, "black"), (True, 0.5, "mask")]


def test_every_flaw_is_named_at_once(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", {"file_name": "a.png", "text": ""}, {"file_name": "b.png", "text": 5})
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "gone.png", "text": "c"}\n{"file_name": "d.png"\n[1]\n')
    with pytest.raises(DataError) as caught:
        open_records(section(folder, on_error="raise"))
    message = str(caught.value)
    assert message.startswith("5 records of the data set cannot be used:")
    assert "set/a.png: no caption (set/metadata.jsonl line 1 has no 'text')" in message
    assert "set/b.png: its caption is int, not text: 5" in message
    assert "set/gone.png: the file is missing, and set/metadata.jsonl line 3 names it" in message
    assert "set/metadata.jsonl line 4: not JSON" in message
    assert "set/metadata.jsonl line 5: not a JSON object" in message
    assert "data.on_error" in message


def test_more_than_ten_flaws_are_counted(tmp_path: Path) -> None:
    for index in range(12):
        picture(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match=r"(?s)12 records.*… and 2 more"):
        open_records(section(tmp_path))


def test_sidecar_flaws(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png").with_suffix(".txt").write_text(" \n")
    picture(tmp_path / "c.png").with_suffix(".txt").write_bytes(b"\xff\xfe\xfa")
    picture(tmp_path / "d.png").with_suffix(".txt").write_text("d")
    (tmp_path / "d.caption").write_text("D")
    with pytest.raises(DataError) as caught:
        open_records(section(tmp_path))
    assert "a.png: no caption (looked for a.txt or a.caption beside it)" in str(caught.value)
    assert "b.png: no caption (b.txt is empty)" in str(caught.value)
    assert "c.png: c.txt is not UTF-8 text" in str(caught.value)
    assert "d.png: two captions, d.txt and d.caption; keep one" in str(caught.value)


def test_skip_leaves_flawed_records_out_and_lists_them(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png").with_suffix(".txt").write_text("bee")
    records = open_records(section(tmp_path, on_error="skip"))
    assert [record.caption for record in records] == ["bee"]
    assert [(flaw.id.rpartition("/")[2], flaw.reason[:10]) for flaw in records.skipped] == [("a.png", "no caption")]


def test_skip_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"(?s)No usable picture remains; 1 record skipped.*a\.png: no caption"):
        open_records(section(tmp_path, on_error="skip"))


def test_pictures_that_the_table_does_not_name_are_noticed(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", {"file_name": "./a.png", "text": "a"})
    picture(folder / "b.png")
    (notice,) = open_records(section(folder)).notices
    assert notice.endswith("pictures that metadata.jsonl does not name are left out: 1 (b.png).")


def test_text_files_without_a_picture_are_noticed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("ant")
    (tmp_path / "b.txt").write_text("bee")
    (notice,) = open_records(section(tmp_path)).notices
    assert notice.endswith("text files without a picture: 1 (b.txt).")


def test_two_tables_are_refused(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", {"file_name": "a.png", "text": "a"})
    (folder / "metadata.csv").write_text("file_name,text\na.png,b\n")
    with pytest.raises(DataError, match=r"both metadata.jsonl and metadata.csv"):
        open_records(section(folder))


def test_metadata_in_inner_folders_is_not_overlooked(tmp_path: Path) -> None:
    table(tmp_path / "train", {"file_name": "a.png", "text": "a"})
    with pytest.raises(DataError, match=r"metadata lies in folders within it, train"):
        open_records(section(tmp_path))


def test_table_named_instead_of_its_folder(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", {"file_name": "a.png", "text": "a"})
    with pytest.raises(DataError, match=r"name the folder that metadata.jsonl lies in"):
        open_records(section(folder / "metadata.jsonl"))


def test_defaults_of_a_source_are_enough(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", {"file_name": "a.png", "text": "a"})
    assert len(open_records(DataSection(sources=[SourceSection(path=str(folder))]))) == 1
