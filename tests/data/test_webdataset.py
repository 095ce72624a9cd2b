"""Tar shards."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from lora_kit.data import Records, open_records
from lora_kit.data.pictures import read_picture
from lora_kit.errors import DataError
from lora_kit.recipe import DataSection


def records_of(path: Path | str, on_error: str = "raise", **source: object) -> Records:
    return open_records(DataSection.model_validate({"sources": [{"path": str(path), **source}], "on_error": on_error}))


def picture(red: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def shard(path: Path, **members: bytes) -> Path:
    return shard_of(path, {name.replace("_", "."): content for name, content in members.items()})


def shard_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def found(records: Records) -> dict[str, tuple[str, int]]:
    """id → caption and the red of the picture, which a pickled record opens."""
    again: list[object] = pickle.loads(pickle.dumps(records.items))
    assert len(again) == len(records)
    return {r.id: (r.caption, read_picture(r).image.getpixel((0, 0))[0]) for r in again}  # pyright: ignore


def test_one_shard(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", x1_png=picture(1), x1_txt=b"ant\n", x2_caption=b"bee", x2_png=picture(2))
    assert found(records_of(path)) == {"a.tar/x1.png": ("ant", 1), "a.tar/x2.png": ("bee", 2)}


def test_json_captions(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", x1_png=picture(1), x1_json=json.dumps({"caption": "ant", "width": 8}).encode())
    assert found(records_of(path)) == {"a.tar/x1.png": ("ant", 1)}


def shards(folder: Path, count: int = 3) -> Path:
    for index in range(count):
        shard(folder / f"{index:03}.tar", x_png=picture(index), x_txt=f"number {index}".encode())
    return folder


EXPECTED = {f"shards/{index:03}.tar/x.png": (f"number {index}", index) for index in range(3)}


@pytest.mark.parametrize("pattern", ["shards", "shards/{000..002}.tar", "shards/*.tar", "shards/{000,00{1..2}}.tar"])
def test_folders_and_patterns(tmp_path: Path, pattern: str) -> None:
    shards(tmp_path / "shards")
    assert found(records_of(tmp_path / pattern)) == EXPECTED


def test_brackets_are_part_of_a_folders_name(tmp_path: Path) -> None:
    shards(tmp_path / "[set] a")
    assert len(records_of(tmp_path / "[set] a" / "*.tar")) == 3


def test_missing_shards_are_named(tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    with pytest.raises(DataError, match=r"2 of 5 files are missing, the first is .*shards/003\.tar"):
        records_of(tmp_path / "shards" / "{000..004}.tar")


def test_a_pattern_without_a_match(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file"):
        records_of(tmp_path / "*.tar")


def test_members_in_folders_and_with_dots(tmp_path: Path) -> None:
    members = {"./c/x.png": picture(1), "./c/x.txt": b"ant", "./c/x.seg.png": picture(9), "c/._x.png": b"junk"}
    records = records_of(shard_of(tmp_path / "a.tar", members))
    assert found(records) == {"a.tar/c/x.png": ("ant", 1)}
    assert "neither pictures nor captions are left out: 1 (c/x.seg.png)" in records.notices[0]


def test_flaws_of_samples_leave_the_others(tmp_path: Path) -> None:
    members = {
        "a.png": picture(1),
        "b.png": picture(2),
        "b.jpg": picture(2, "JPEG"),
        "b.txt": b"bee",
        "c.png": picture(3),
        "c.txt": b"cat",
    }
    records = records_of(shard_of(tmp_path / "s.tar", members), on_error="skip")
    assert found(records) == {"s.tar/c.png": ("cat", 3)}
    assert records.skipped == [
        ("s.tar/a.png", "no caption (looked for a.txt or a.caption beside it), nor a.json"),
        ("s.tar/b.png", "its key has several pictures, png and jpg"),
    ]


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png"])
def test_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    path = shard_of(tmp_path / "s.tar", {name: picture(1), "b.png": picture(2), "b.txt": b"bee"})
    records = records_of(path, on_error="skip")
    assert [record.caption for record in records] == ["bee"]
    assert records.skipped[0].reason.startswith("its name leaves the archive")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_shards_are_not_followed(tmp_path: Path, kind: bytes) -> None:
    path = shard(tmp_path / "s.tar", b_png=picture(2), b_txt=b"bee", a_txt=b"ant")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = kind, "/etc/secret.png"
        archive.addfile(link)
    records = records_of(path, on_error="skip")
    assert [record.caption for record in records] == ["bee"]
    assert records.skipped == [("s.tar/a.png", "is a link to '/etc/secret.png'; links are not followed")]


def damaged(path: Path, keep: int | None, at: int = 0) -> Path:
    content = bytearray(path.read_bytes())
    content[at : at + 8] = b"\xff" * 8 if keep is None else content[at : at + 8]
    path.write_bytes(content[:keep])
    return path


def test_a_truncated_shard_says_so_and_keeps_what_came_before(tmp_path: Path) -> None:
    # Blocks of 512 bytes: header and content of a.png (1 block), of a.txt, of b.png; cut within b.png's content.
    assert len(picture(1)) < 512
    path = shard(tmp_path / "s.tar", a_png=picture(1), a_txt=b"ant", b_png=picture(2), b_txt=b"bee")
    records = records_of(damaged(path, 5 * 512 + 20), on_error="skip")
    assert [record.caption for record in records] == ["ant"]
    assert any("damaged after 3 members" in reason for id, reason in records.skipped if id == "s.tar")


def test_a_bad_header_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", a_png=picture(1), a_txt=b"ant", b_png=picture(2), b_txt=b"bee")
    with pytest.raises(DataError, match=r"s\.tar: damaged after 2 members \(bad header\)"):
        records_of(damaged(path, None, at=4 * 512 + 148))  # the checksum of b.png's header


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(b"hello" * 200)
    with pytest.raises(DataError, match=r"s\.tar is not a readable tar archive"):
        records_of(tmp_path / "s.tar")


def test_compressed_archives_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "s.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"a compressed archive is read from its beginning only. Unpack it"):
        records_of(tmp_path / "s.tar.gz")


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"where does nothing with tar shards"):
        records_of(shards(tmp_path / "shards"), where={"kind": ["a"]})


def test_shards_that_webdataset_itself_wrote(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "set-%03d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(3):
            cells = {"png": Image.new("RGB", (8, 8), (number, 0, 0)), "txt": f"number {number}"}
            writer.write({"__key__": f"{number:05d}", **cells})
    shards = found(records_of(tmp_path / "set-{000..001}.tar"))
    assert list(shards.values()) == [("number 0", 0), ("number 1", 1), ("number 2", 2)]
