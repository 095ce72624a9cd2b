"""Hints spare reading pictures, and are distrusted wherever a file system can tell."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import time
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from lora_kit.data import Record, open_records
from lora_kit.data.cache import Facts, PictureHints, read_facts, survey, verify_hints
from lora_kit.data.cache.origin import identity, read_bytes
from lora_kit.data.sources.cells import open_cell
from lora_kit.errors import DataError
from lora_kit.progress import no_progress
from lora_kit.recipe import DataSection

FACTS = Facts(hashlib.sha256(b"x").digest(), 30, 20, False)


def save_picture(path: Path, seed: int, age_s: float = 100.0) -> None:
    """A small bitmap of noise: equal sizes in bytes, whatever is in it."""
    values = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(values).save(path, "BMP")
    stamp = time.time() - age_s
    os.utime(path, (stamp, stamp))


def record_of(path: Path) -> Record:
    return Record(path.name, "", 0, 1, partial(Image.open, path))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.bmp"
    save_picture(path, 0)
    return path


def test_hints_come_back(tmp_path: Path) -> None:
    hints = PictureHints(tmp_path)
    facts = [FACTS._replace(width=number, animated=number == 3) for number in range(40)]
    for number, fact in enumerate(facts):
        hints.add(f"picture {number}", fact)
    assert hints.find("picture 5") == facts[5]
    hints.flush()
    for opened in (hints, PictureHints(tmp_path)):
        assert [opened.find(f"picture {number}") for number in range(40)] == facts
        assert opened.find("picture 40") is None


def test_hints_of_two_processes_add_up_and_those_that_disagree_are_none(tmp_path: Path) -> None:
    first, second = PictureHints(tmp_path), PictureHints(tmp_path)
    first.add("both", FACTS)
    first.add("same", FACTS)
    second.add("both", FACTS._replace(sha256=bytes(32)))
    second.add("same", FACTS)
    second.add("mine", FACTS)
    first.flush()
    second.flush()
    opened = PictureHints(tmp_path)
    assert (opened.find("both"), opened.find("same"), opened.find("mine")) == (None, FACTS, FACTS)
    first.refresh()
    assert first.find("mine") == FACTS


def test_many_small_files_are_packed_into_one(tmp_path: Path) -> None:
    for number in range(40):
        hints = PictureHints(tmp_path)
        hints.add(str(number), FACTS._replace(width=number))
        hints.flush()
    assert len(list((tmp_path / "hints").iterdir())) <= 17
    opened = PictureHints(tmp_path)
    assert [opened.find(str(number)) for number in range(40)] == [FACTS._replace(width=n) for n in range(40)]


def test_a_damaged_file_of_hints_is_not_believed(tmp_path: Path) -> None:
    hints = PictureHints(tmp_path)
    hints.add("a", FACTS)
    hints.flush()
    path = next((tmp_path / "hints").iterdir())
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    assert PictureHints(tmp_path).find("a") is None


def test_a_changed_file_is_another_picture(picture: Path) -> None:
    before = identity(record_of(picture))
    assert before is not None and identity(record_of(picture)) == before
    stat = picture.stat()
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    touched = identity(record_of(picture))
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    picture.write_bytes(picture.read_bytes() + b"\0")
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    longer = identity(record_of(picture))
    copy = picture.with_name("copy.bmp")
    copy.write_bytes(picture.read_bytes())
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    copy.replace(picture)  # same name, size and time
    assert len({before, touched, longer, identity(record_of(picture))}) == 4


def test_a_file_just_written_is_not_trusted_to_stay(picture: Path) -> None:
    save_picture(picture, 1, age_s=0)
    assert identity(record_of(picture)) is None


def test_facts_are_read_once(picture: Path, tmp_path: Path) -> None:
    hints = PictureHints(tmp_path)
    records = [record_of(picture)]
    assert survey(records, hints) == [None]
    facts = read_facts(records, hints, 0, no_progress)
    assert facts == [Facts(hashlib.sha256(picture.read_bytes()).digest(), 10, 12, False)]
    assert survey(records, PictureHints(tmp_path)) == facts


def test_a_change_that_keeps_size_and_time_is_found_by_verifying(picture: Path, tmp_path: Path) -> None:
    hints, records = PictureHints(tmp_path), [record_of(picture)]
    old = read_facts(records, hints, 0, no_progress)
    assert verify_hints(hints, records, no_progress) == []
    stat = picture.stat()
    content = bytearray(picture.read_bytes())
    content[-1] ^= 1
    with picture.open("r+b") as file:
        file.write(content)
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert survey(records, hints) == old  # the documented blind spot
    assert verify_hints(hints, records, no_progress) == ["a.bmp"]
    for again in (hints, PictureHints(tmp_path)):
        assert survey(records, again) == [None]
    assert read_facts(records, hints, 0, no_progress) != old


def test_a_picture_of_a_saved_data_set_is_known_by_its_table(tmp_path: Path) -> None:
    cells = [{"bytes": png(number), "path": None} for number in range(3)]
    table = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b", "c"]})
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    for file in (tmp_path / "set").iterdir():
        os.utime(file, (1e9, 1e9))
    section = DataSection.model_validate({"sources": [{"path": str(tmp_path / "set")}]})
    records = list(open_records(section))
    names = [identity(record) for record in records]
    assert None not in names and len(set(names)) == 3
    assert [read_bytes(record) for record in records] == [(cell["bytes"], None) for cell in cells]
    assert [identity(record) for record in open_records(section)] == names


@pytest.mark.parametrize("as_struct", [True, False])
def test_a_table_that_only_names_its_pictures_does_not_stand_for_them(tmp_path: Path, as_struct: bool) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    cell = {"bytes": None, "path": "a.png"} if as_struct else "a.png"
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": plain if as_struct else datasets.Value("string")})
    datasets.Dataset.from_dict({"image": [cell]}, features=features).save_to_disk(tmp_path / "set")
    for file in (tmp_path / "set").iterdir():
        os.utime(file, (1e9, 1e9))
    held = datasets.load_from_disk(str(tmp_path / "set"))
    record = Record("a", "", 0, 1, partial(open_cell, held, 0, tmp_path))
    assert identity(record) is None
    assert read_bytes(record) == (png(0), None)


def test_a_member_of_a_tar_shard_is_known_by_shard_and_place(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number in range(2):
            for name, content in ((f"{number}.png", png(number)), (f"{number}.txt", b"red")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    os.utime(tmp_path / "0.tar", (1e9, 1e9))
    section = DataSection.model_validate({"sources": [{"path": str(tmp_path / "0.tar")}]})
    records = list(open_records(section))
    names = [identity(record) for record in records]
    assert None not in names and len(set(names)) == 2
    assert [read_bytes(record) for record in records] == [(png(0), None), (png(1), None)]


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a: the file is missing"):
        read_bytes(Record("a", "", 0, 1, partial(Image.open, tmp_path / "gone.png")))
    with pytest.raises(DataError, match="a: not a readable picture"):
        read_bytes(Record("a", "", 0, 1, partial(_open_text)))
    with pytest.raises(DataError, match="a: its picture is no file"):
        read_bytes(Record("a", "", 0, 1, partial(Image.new, "RGB", (4, 4))))


def _open_text() -> Image.Image:
    return Image.open(io.BytesIO(b"no picture"))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
