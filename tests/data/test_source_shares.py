"""Weights of sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from lora_kit.data import open_records
from lora_kit.data.sources.shares import balanced_repeats, weighted_repeats
from lora_kit.errors import DataError
from lora_kit.recipe import DataSection

SIZES = st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.01, 100)), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(SIZES)
def test_every_share_is_met_within_a_hundredth(sources: list[tuple[int, float]]) -> None:
    samples, weights = zip(*sources, strict=True)
    repeats = weighted_repeats(samples, weights)
    epoch = sum(count * times for count, times in zip(samples, repeats, strict=True))
    for count, weight, times in zip(samples, weights, repeats, strict=True):
        assert count * times / epoch == pytest.approx(weight / sum(weights), rel=0.01)


@pytest.mark.parametrize(
    ("samples", "weights", "expected"),
    [
        ([5, 5], [1, 1], [1, 1]),
        ([10, 1000], [1, 1], [100, 1]),
        ([10, 10], [1.5, 1], [3, 2]),
        ([10, 0], [1, 1], [1, 1]),  # nothing usable in the second
    ],
)
def test_repeats_are_the_fewest(samples: list[int], weights: list[float], expected: list[int]) -> None:
    assert weighted_repeats(samples, weights) == expected


def folder(path: Path, count: int) -> str:
    path.mkdir()
    for index in range(count):
        Image.new("RGB", (8, 8)).save(path / f"{index}.png")
        (path / f"{index}.txt").write_text("a")
    return str(path)


def section(*sources: dict[str, object]) -> DataSection:
    return DataSection.model_validate({"sources": list(sources)})


def test_weights_become_repeats_of_records_and_are_said(tmp_path: Path) -> None:
    few = {"path": folder(tmp_path / "few", 1), "weight": 0.75}
    many = {"path": folder(tmp_path / "many", 3), "weight": 0.25}
    records = open_records(section(few, many))
    assert [record.repeats for record in records] == [9, 1, 1, 1]
    assert "few × 9 = 75.0%" in records.notices[0]


def test_weights_multiply_the_repeats_of_kohyas_folders(tmp_path: Path) -> None:
    (tmp_path / "k").mkdir()
    folder(tmp_path / "k" / "3_a", 1)
    folder(tmp_path / "k" / "1_b", 1)
    other = {"path": folder(tmp_path / "other", 2), "weight": 1.0}
    records = open_records(section({"path": str(tmp_path / "k"), "weight": 1.0}, other))
    assert [record.repeats for record in records] == [1, 3, 2, 2]


def test_one_weight_needs_the_others() -> None:
    with pytest.raises(ValidationError, match="has no weight, but another source has"):
        section({"path": "a", "weight": 1.0}, {"path": "b"})


def test_weight_and_repeats_of_one_source_are_refused() -> None:
    with pytest.raises(ValidationError, match="does nothing beside `weight: 2`"):
        section({"path": "a", "weight": 2.0, "repeats": 3})


def test_weights_that_make_an_endless_epoch_are_refused(tmp_path: Path) -> None:
    sources = [{"path": folder(tmp_path / "a", 2), "weight": 1e9}, {"path": folder(tmp_path / "b", 1), "weight": 1.0}]
    with pytest.raises(DataError, match=r"an epoch of 1,000,000,001 samples.*source 1 has 1 samples"):
        open_records(section(*sources))


def test_regularisation_pictures_are_repeated_to_as_many_as_the_others(tmp_path: Path) -> None:
    subject = {"path": folder(tmp_path / "subject", 4), "repeats": 3}
    prior = {"path": folder(tmp_path / "prior", 5), "regularisation": True}
    records = open_records(DataSection.model_validate({"sources": [subject, prior]}))
    assert [record.repeats for record in records if record.is_regularisation] == [3, 3, 2, 2, 2]
    assert any("repeated to the 12 of the other pictures" in notice for notice in records.notices)


def test_more_regularisation_pictures_than_others_are_all_kept(tmp_path: Path) -> None:
    subject = {"path": folder(tmp_path / "subject", 2)}
    prior = {"path": folder(tmp_path / "prior", 5), "regularisation": True}
    assert [r.repeats for r in open_records(DataSection.model_validate({"sources": [subject, prior]}))] == [1] * 7


def test_weights_of_all_sources_decide_instead(tmp_path: Path) -> None:
    subject = {"path": folder(tmp_path / "subject", 2), "weight": 2}
    prior = {"path": folder(tmp_path / "prior", 4), "weight": 1, "regularisation": True}
    records = open_records(DataSection.model_validate({"sources": [subject, prior]}))
    assert [record.repeats for record in records] == [4, 4, 1, 1, 1, 1]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(0, 100))
def test_balance_reaches_exactly_what_is_wanted_and_differs_by_one(repeats: list[int], wanted: int) -> None:
    raised = balanced_repeats(repeats, wanted)
    assert sum(raised) == max(wanted, sum(repeats))
    added = [after - before for after, before in zip(raised, repeats, strict=True)]
    assert max(added) - min(added) <= 1 and min(added) >= 0
