"""The held-out part of the training pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lora_kit.data import Record
from lora_kit.data.split import open_parted_sets, part_records
from lora_kit.errors import DataError
from lora_kit.progress import no_progress
from lora_kit.recipe import DataSection, SplitSection


def record(name: str, **changes: bool) -> Record:
    return Record(name, "caption", 0, 1, lambda: Image.new("RGB", (8, 8)), **changes)


def digests(count: int, first: int = 0) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in range(first, first + count)]


def names(records: list[Record]) -> set[str]:
    return {one.id for one in records}


def test_adding_pictures_moves_none_with_a_fraction() -> None:
    split = SplitSection(fraction=0.2)
    few = part_records([record(str(n)) for n in range(200)], digests(200), split)
    many = part_records([record(str(n)) for n in range(500)], digests(500), split)
    assert names(few.held_out) == {name for name in names(many.held_out) if int(name) < 200}
    # Binomial(500, 0.2): 100 ± 9; four deviations.
    assert 64 <= len(many.held_out) <= 136


def test_a_count_holds_out_exactly_so_many_whatever_their_order() -> None:
    hashes = digests(50)
    forth = part_records([record(str(n)) for n in range(50)], hashes, SplitSection(count=7))
    back = part_records([record(str(n)) for n in reversed(range(50))], hashes[::-1], SplitSection(count=7))
    assert len(forth.held_out) == 7
    assert names(forth.held_out) == names(back.held_out)


def test_copies_stay_on_one_side_and_are_measured_once() -> None:
    hashes = digests(20)
    records = [record(f"{n}-{copy}") for copy in "ab" for n in range(20)]
    parts = part_records(records, hashes * 2, SplitSection(count=5))
    held = {name.split("-")[0] for name in names(parts.held_out)}
    assert len(held) == len(parts.held_out) == parts.left_out == 5
    assert not held & {name.split("-")[0] for name in names(parts.training)}


def test_regularisation_is_not_measured_on_nor_trained_on_where_it_is_held_out() -> None:
    hashes = digests(6)
    records = [record(f"own-{n}") for n in range(6)] + [record(f"prior-{n}", from_base=True) for n in range(6)]
    parts = part_records(records, hashes * 2, SplitSection(count=3))
    assert all(name.startswith("own") for name in names(parts.held_out))
    held = {name[-1] for name in names(parts.held_out)}
    assert not held & {name[-1] for name in names(parts.training)}


@pytest.mark.parametrize("split", [SplitSection(count=4), SplitSection(fraction=1e-9)])
def test_an_empty_side_is_refused(split: SplitSection) -> None:
    with pytest.raises(DataError, match=r"validation\.held_out: (all|none of the) 4"):
        part_records([record(str(n)) for n in range(4)], digests(4), split)


def test_the_bytes_decide_whatever_a_file_is_called(make_picture_folder, tmp_path: Path) -> None:
    one = make_picture_folder(tmp_path / "one", count=6, size=(16, 16))
    two = tmp_path / "two"
    two.mkdir()
    for number, path in enumerate(sorted(one.glob("*.png"))):  # the same pictures under other names
        (two / f"copy-{number}.png").write_bytes(path.read_bytes())
        (two / f"copy-{number}.txt").write_text("another caption")
    sources = [{"path": str(one)}, {"path": str(two)}]
    section = DataSection.model_validate({"sources": sources, "resolution": 16})
    training, held_out = open_parted_sets(section, SplitSection(count=2), 0, no_progress)
    assert (training.record_count, held_out.record_count) == (8, 2)
    bytes_of = {r.open().tobytes() for r in held_out.records}
    assert not bytes_of & {r.open().tobytes() for r in training.records}
    assert any("Held out: 2 pictures, with 2 more copies" in notice for notice in training.notices)
