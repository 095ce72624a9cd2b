"""Resolutions and buckets of sd-scripts' data-set TOML."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lora_kit.data.buckets import bucket_sizes, fit_picture
from lora_kit.errors import RecipeError
from lora_kit.recipe import BucketSection, DataSection, dump_recipe, expand_sources, load_recipe


def expand(tmp_path: Path, toml: str, **data: object) -> DataSection:
    (tmp_path / "set.toml").write_text(toml)
    section = DataSection.model_validate({"sources": [{"path": "set.toml"}], **data})
    return expand_sources(section, tmp_path)


def message(tmp_path: Path, toml: str, **data: object) -> str:
    with pytest.raises(RecipeError) as caught:
        expand(tmp_path, toml, **data)
    return str(caught.value)


def sets(*keys: str, top: str = "") -> str:
    """A `[[datasets]]` with one subset for each text of keys."""
    parts = [f"[[datasets]]\n{own}\n[[datasets.subsets]]\nimage_dir = 's{n}'\n" for n, own in enumerate(keys)]
    return "\n".join([f"[general]\n{top}", *parts])


BUCKETS = "enable_bucket = true\n"


def buckets_of(tmp_path: Path, keys: str, **data: object) -> BucketSection:
    found = expand(tmp_path, sets("", top=f"{BUCKETS}resolution = 512\n{keys}"), **data).buckets
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("keys", "rules"),
    [
        # sd-scripts' own defaults, not those of data.buckets: it scales small pictures up.
        ("", {"step": 64, "min_side": 256, "max_side": 1024, "upscale": True}),
        ("bucket_reso_steps = 8\nmin_bucket_reso = 320\nmax_bucket_reso = 768", {"step": 8, "min_side": 320}),
        ("min_bucket_reso = 250\nmax_bucket_reso = 1030", {"min_side": 192, "max_side": 1088}),
        ("bucket_no_upscale = false", {"upscale": True}),
        ("bucket_no_upscale = true\nmin_bucket_reso = 500", {"upscale": False, "min_side": 64, "max_side": 4096}),
    ],
)
def test_bucket_keys(tmp_path: Path, keys: str, rules: dict[str, Any]) -> None:
    found = buckets_of(tmp_path, keys)
    assert {name: getattr(found, name) for name in rules} == rules


def made_by_sd_scripts(resolution: int, low: int, high: int, step: int) -> set[tuple[int, int]]:
    """The sizes that its documentation describes: for each width in steps within the bounds, the largest height in
    steps that keeps the area and the bounds."""
    square = resolution // step * step
    sizes = {(square, square)}
    for width in range(low, high + 1, step):
        height = min(high, resolution**2 // width // step * step)
        if height >= low:
            sizes |= {(width, height), (height, width)}
    return sizes


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (512, 8)])
def test_the_buckets_are_sd_scripts_less_those_that_another_contains(
    tmp_path: Path, resolution: int, step: int
) -> None:
    keys = f"{BUCKETS}resolution = {resolution}\nbucket_reso_steps = {step}"
    rules = expand(tmp_path, sets(keys)).buckets
    assert rules is not None
    theirs = made_by_sd_scripts(resolution, 256, 1024, step)
    largest = {a for a in theirs if not any(a != b and a[0] <= b[0] and a[1] <= b[1] for b in theirs)}
    ours = set(bucket_sizes(resolution, rules))
    assert largest <= ours <= theirs


def test_without_upscaling_a_small_picture_of_any_shape_is_never_enlarged(tmp_path: Path) -> None:
    rules = buckets_of(tmp_path, "bucket_no_upscale = true")
    for picture in ((100, 100), (64, 2000), (300, 70), (4000, 500), (511, 511)):
        fit = fit_picture(picture, 512, rules)
        assert not fit.enlarged
        assert math.prod(fit.size) <= 512**2
    assert fit_picture((100, 100), 512, rules).size == (64, 64)  # as sd-scripts: cut to whole steps
    assert fit_picture((4000, 500), 512, rules).size == (1344, 192)  # beyond the bounds of 256 and 1024


def test_bucket_keys_do_nothing_without_enable_bucket(tmp_path: Path) -> None:
    toml = sets("bucket_no_upscale = true\nmin_bucket_reso = 320", "enable_bucket = false\nmax_bucket_reso = 640")
    assert expand(tmp_path, toml).buckets is None


def test_the_recipe_adds_what_the_toml_does_not_say(tmp_path: Path) -> None:
    own = {"short": "short", "min_side": 384, "step": 64}
    found = buckets_of(tmp_path, "bucket_reso_steps = 64", buckets=own)
    assert (found.short, found.min_side, found.max_side, found.upscale) == ("short", 384, 1024, True)


@pytest.mark.parametrize(
    ("keys", "buckets", "said"),
    [
        (
            "bucket_reso_steps = 32",
            {"step": 64},
            "bucket_reso_steps means data.buckets.step: 32, but the recipe has 64",
        ),
        ("bucket_no_upscale = true", {"upscale": True}, "means data.buckets.upscale: false, but the recipe has true"),
        ("", None, "enable_bucket = true, but the recipe turns off data.buckets"),
        ("enable_bucket = false", {}, "enable_bucket = false, but the recipe has data.buckets"),
    ],
)
def test_what_both_say_must_agree(tmp_path: Path, keys: str, buckets: object, said: str) -> None:
    top = keys if "enable_bucket" in keys else BUCKETS + keys
    assert said in message(tmp_path, sets("", top=top), buckets=buckets)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (BUCKETS, "", "enable_bucket differs between data sets"),
        (BUCKETS, f"{BUCKETS}bucket_reso_steps = 32", "bucket_reso_steps differs between data sets (64 and 32)"),
        (BUCKETS, f"{BUCKETS}bucket_no_upscale = true", "bucket_no_upscale differs between data sets"),
        (f"{BUCKETS}max_bucket_reso = 768", BUCKETS, "max_bucket_reso differs between data sets (768 and 1024)"),
        ("batch_size = 4", "batch_size = 2", "batch_size differs between subsets; data.batch_size is one for all"),
    ],
)
def test_data_sets_that_differ_in_what_is_one_here(tmp_path: Path, first: str, second: str, said: str) -> None:
    assert said in message(tmp_path, sets(first, second))


def test_each_data_set_has_its_own_resolution(tmp_path: Path) -> None:
    data = expand(tmp_path, sets("resolution = 512", "resolution = [768, 768]", "resolution = 512"))
    assert data.resolution == 512
    assert [source.resolution for source in data.sources] == [None, 768, None]


def test_the_recipes_resolution_is_that_of_data_sets_without_one(tmp_path: Path) -> None:
    data = expand(tmp_path, sets("", "resolution = 768"), resolution=256)
    assert data.resolution == 256
    assert [source.resolution for source in data.sources] == [None, 768]
    assert "datasets.0.resolution: needed, as other data sets have one (768)" in message(
        tmp_path, sets("", "resolution = 768")
    )


def test_a_resolution_that_the_recipe_contradicts(tmp_path: Path) -> None:
    said = message(tmp_path, sets("resolution = 512", "resolution = 768"), resolution=640)
    assert "resolution means data.resolution: 512 and 768, but the recipe has 640" in said
    assert expand(tmp_path, sets("resolution = 512", "resolution = 768"), resolution=768).sources[0].resolution == 512


def test_the_recipes_resolution_is_that_of_sources_beside_the_toml(tmp_path: Path) -> None:
    beside = [{"path": "plain"}, {"path": "set.toml"}]
    data = expand(tmp_path, sets("resolution = 768"), sources=beside, resolution=512)
    assert (data.resolution, [source.resolution for source in data.sources]) == (512, [None, 768])


def test_oblong_resolutions_are_refused_with_the_square_of_their_area(tmp_path: Path) -> None:
    said = message(tmp_path, sets("resolution = [768, 512]"))
    assert "datasets.0.subsets.0.resolution: resolution = [768, 512] is not a square. Write 624" in said


def test_two_files_share_what_is_one_here(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(sets("resolution = 512"))
    (tmp_path / "b.toml").write_text(sets("resolution = 768").replace("s0", "t0"))
    section = DataSection.model_validate({"sources": [{"path": "a.toml"}, {"path": "b.toml"}]})
    assert [source.resolution for source in expand_sources(section, tmp_path).sources] == [None, 768]
    (tmp_path / "b.toml").write_text(sets("batch_size = 3"))
    (tmp_path / "a.toml").write_text(sets("batch_size = 2"))
    with pytest.raises(RecipeError, match=r"a\.toml and .*b\.toml:\n  batch_size differs"):
        expand_sources(section, tmp_path)


def test_bounds_that_no_bucket_fits_are_told_with_the_recipes_names(tmp_path: Path) -> None:
    said = message(tmp_path, sets(f"{BUCKETS}resolution = 512\nmin_bucket_reso = 576"))
    assert "got 512, whose square of 512 is below `data.buckets.min_side` = 576" in said


def test_a_recipe_with_buckets_of_a_toml_reads_back_the_same(tmp_path: Path) -> None:
    for name in ("s0", "s1"):
        (tmp_path / name).mkdir()
    (tmp_path / "set.toml").write_text(sets("resolution = 512", "resolution = 768", top=BUCKETS))
    (tmp_path / "r.yaml").write_text("data: {sources: [{path: set.toml}]}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
