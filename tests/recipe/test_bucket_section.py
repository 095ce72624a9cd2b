"""`data.buckets` and resolutions of sources: what is refused, and how it is said."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lora_kit.recipe import BucketSection, DataSection, Recipe


def data(buckets: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
    return {"sources": [{"path": "pictures"}], "buckets": buckets, **fields}


def test_buckets_are_off_unless_there_is_a_section() -> None:
    assert DataSection.model_validate({"sources": [{"path": "pictures"}]}).buckets is None
    assert DataSection.model_validate(data({})).buckets == BucketSection()


@pytest.mark.parametrize(
    ("section", "path", "said"),
    [
        (data({}, resolution=32), ("resolution",), r"got 32, below `data.buckets.step` = 64; make that at most 32"),
        (data({"min_side": 104}), ("buckets", "min_side"), r"got 104, not a multiple of `step` = 64; write 64 or 128"),
        (data({"max_side": 640, "step": 128}, resolution=768), ("resolution",), r"768 is above .*max_side` = 640"),
        (data({"min_side": 576}), ("resolution",), r"512 is below `data.buckets.min_side` = 576"),
        (data({"resolutions": [512, 32]}), ("buckets", "resolutions", 1), "got 32, below"),
        (data({}, sources=[{"path": "a", "resolution": 8}]), ("sources", 0, "resolution"), "got 8, below"),
        (data({"resolutions": [512, 512]}), ("buckets", "resolutions"), "512 is there twice"),
        (data({"resolutions": []}), ("buckets", "resolutions"), "at least 1 item"),
        (data({"step": 12}), ("buckets", "step"), "multiple of 8"),
    ],
)
def test_what_cannot_be_is_refused(section: dict[str, Any], path: tuple[str | int, ...], said: str) -> None:
    with pytest.raises(ValidationError, match=said) as caught:
        DataSection.model_validate(section)
    assert [error["loc"] for error in caught.value.errors()] == [path]


def test_resolution_of_the_data_set_is_free_where_buckets_name_their_own() -> None:
    DataSection.model_validate(data({"resolutions": [256], "max_side": 384}))


def test_held_out_pictures_need_a_bucket_too() -> None:
    section = data({"resolutions": [256], "max_side": 384})
    recipe = {"data": section, "validation": {"held_out": {"path": "others"}}}
    with pytest.raises(ValidationError, match=r"above `data.buckets.max_side` = 384.*Held-out pictures"):
        Recipe.model_validate(recipe)
    recipe["validation"] = {"held_out": {"path": "others", "resolution": 256}}
    Recipe.model_validate(recipe)
