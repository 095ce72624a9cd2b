"""Which bucket a picture gets, what is cut off, and sizes from headers alone."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from lora_kit.data import Record
from lora_kit.data.buckets import Size, bucket_sizes, crop_loss, fills, fit_picture, fit_to_all, nearest_size
from lora_kit.data.crops import covering_box, cut_picture
from lora_kit.data.pictures import picture_size, read_picture
from lora_kit.data.sizes import read_sizes
from lora_kit.progress import no_progress
from lora_kit.recipe import BucketSection

quick = settings(max_examples=60, deadline=None)
sides = st.integers(1, 5000)
pictures = st.tuples(sides, sides)
rules = st.builds(BucketSection, step=st.sampled_from([8, 16, 64]), upscale=st.booleans())
resolutions = st.integers(8, 128).map(lambda n: 8 * n).filter(lambda side: side >= 64)


def test_buckets_of_512_are_those_that_sd_users_know() -> None:
    wide = [(1024, 256), (768, 320), (640, 384), (576, 448)]
    assert bucket_sizes(512, BucketSection()) == (*wide, (512, 512), *((h, w) for w, h in reversed(wide)))


@quick
@given(resolutions, rules)
def test_buckets_keep_their_bounds(resolution: int, section: BucketSection) -> None:
    sizes = bucket_sizes(resolution, section)
    side = resolution // section.step * section.step
    assert (side, side) in sizes
    assert len(set(sizes)) == len(sizes)
    assert {(h, w) for w, h in sizes} == set(sizes)
    for width, height in sizes:
        assert width % section.step == height % section.step == 0
        assert width * height <= resolution**2
        assert max(width, height) <= 2 * resolution


def test_bounds_of_the_recipe_hold() -> None:
    sizes = bucket_sizes(512, BucketSection(step=8, min_side=400, max_side=600))
    assert min(min(size) for size in sizes) == 400
    assert max(max(size) for size in sizes) == 600


@quick
@given(pictures, resolutions, rules)
def test_no_other_bucket_has_a_nearer_shape(picture: Size, resolution: int, section: BucketSection) -> None:
    sizes = bucket_sizes(resolution, section)
    found = nearest_size(picture, sizes)

    def distance(size: Size) -> float:
        return abs(math.log(picture[0] / picture[1]) - math.log(size[0] / size[1]))

    assert distance(found) <= min(map(distance, sizes)) + 1e-12  # rounding of two logarithms


@quick
@given(pictures, pictures)
def test_crop_loss_is_the_distance_of_shapes_and_what_the_crop_leaves_out(picture: Size, size: Size) -> None:
    loss = crop_loss(picture, size)
    distance = abs(math.log(picture[0] / picture[1]) - math.log(size[0] / size[1]))
    assert loss == pytest.approx(1 - math.exp(-distance), abs=1e-12)
    left, top, right, bottom = covering_box(picture, size)
    area = picture[0] * picture[1]
    # Each edge is rounded to the picture's own scale: 2 · eps · side in a length, 4 · eps · area in their product.
    edges = 4 * sys.float_info.epsilon * area
    assert (right - left) * (bottom - top) == pytest.approx((1 - loss) * area, rel=1e-12, abs=edges)


@quick
@given(pictures, resolutions, rules)
def test_a_turned_picture_gets_the_turned_bucket(picture: Size, resolution: int, section: BucketSection) -> None:
    # A square picture is its own turned one, and its bucket is a square: there always is one.
    found = fit_picture(picture, resolution, section)
    turned = fit_picture((picture[1], picture[0]), resolution, section)
    assert turned.size == (found.size[1], found.size[0])


@quick
@given(pictures, resolutions, rules)
def test_a_picture_is_enlarged_only_if_asked_or_too_small_for_all(
    picture: Size, resolution: int, section: BucketSection
) -> None:
    fit = fit_picture(picture, resolution, section)
    assert fit.enlarged == (not fills(picture, fit.size))
    assert not (fit.lowered and section.upscale)
    if fit.enlarged and not section.upscale:
        assert min(picture) < section.step  # every smaller square that is a multiple of `step` was tried
    if fit.lowered:
        assert not fills(picture, nearest_size(picture, bucket_sizes(resolution, section)))


@pytest.mark.parametrize(
    ("picture", "size", "lowered", "enlarged"),
    [
        ((4000, 3000), (576, 448), False, False),
        ((512, 512), (512, 512), False, False),
        ((511, 512), (448, 448), True, False),
        ((300, 400), (256, 384), True, False),
        ((40, 90), (64, 64), True, True),
    ],
)
def test_small_pictures_go_down_not_up(picture: Size, size: Size, lowered: bool, enlarged: bool) -> None:
    fit = fit_picture(picture, 512, BucketSection())
    assert (fit.size, fit.lowered, fit.enlarged) == (size, lowered, enlarged)


def test_upscale_gives_the_bucket_of_the_shape() -> None:
    fit = fit_picture((300, 400), 512, BucketSection(upscale=True))
    assert (fit.size, fit.lowered, fit.enlarged) == ((448, 576), False, True)


def test_min_side_stops_the_way_down() -> None:
    fit = fit_picture((300, 400), 512, BucketSection(min_side=384))
    assert (fit.size, fit.enlarged) == ((384, 384), True)


def test_without_buckets_there_is_the_square() -> None:
    assert fit_picture((300, 900), 512, None).size == (512, 512)
    assert fit_picture((300, 900), 512, None).enlarged


def test_a_picture_of_unknown_size_waits_in_the_square() -> None:
    assert fit_picture(None, 512, BucketSection()) == ((512, 512), 512, False, False)


@pytest.mark.parametrize(
    ("picture", "fields", "sizes"),
    [
        ((2000, 2000), {}, [(256, 256), (512, 512)]),
        ((300, 300), {}, [(256, 256)]),
        ((300, 300), {"upscale": True}, [(256, 256), (512, 512)]),
        ((200, 200), {}, [(192, 192)]),
        ((200, 200), {"upscale": True}, [(256, 256), (512, 512)]),
        ((2000, 2000), {"per_picture": "largest"}, [(512, 512)]),
        ((300, 300), {"per_picture": "largest", "upscale": True}, [(256, 256)]),
        ((200, 200), {"per_picture": "largest", "upscale": True}, [(256, 256)]),
    ],
)
def test_several_resolutions(picture: Size, fields: dict[str, Any], sizes: list[Size]) -> None:
    fits = fit_to_all(picture, [512, 256], BucketSection(**fields))
    assert [fit.size for fit in fits] == sizes


def test_resolutions_with_a_bucket_in_common_use_it_once() -> None:
    assert [fit.size for fit in fit_to_all((900, 900), [512, 520], BucketSection())] == [(512, 512)]


def test_pixels_are_taken_as_they_are_where_one_side_fits() -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 16, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    assert np.array_equal(np.asarray(cut_picture(image, (16, 12))), values[4:16])
    assert np.array_equal(np.asarray(cut_picture(image, (16, 12), 0.0, 1.0)), values[8:])
    assert np.array_equal(np.asarray(cut_picture(image, (16, 20))), values)


@quick
@given(pictures, pictures, st.floats(0, 1), st.floats(0, 1))
def test_every_crop_lies_within_the_picture(picture: Size, size: Size, across: float, down: float) -> None:
    left, top, right, bottom = covering_box(picture, size, across, down)
    slack = 1e-9 * max(picture)
    assert left >= 0 and top >= 0
    assert right <= picture[0] + slack and bottom <= picture[1] + slack


def record(path: Path) -> Record:
    return Record(path.name, "", 0, 1, partial(Image.open, path))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
@pytest.mark.parametrize("code", [1, 3, 6, 8])
def test_header_size_is_that_of_the_upright_picture(tmp_path: Path, suffix: str, code: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = code
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (40, 24)).save(path, exif=exif)
    assert picture_size(record(path)) == read_picture(record(path)).image.size


def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 24)).save(path)
    content = path.read_bytes()
    chunk = tmp_path / "chunk"
    with chunk.open("wb") as file:
        PngImagePlugin.putchunk(file, b"eXIf", exif.tobytes()[6:])
    path.write_bytes(content[:-12] + chunk.read_bytes() + content[-12:])  # before IEND's 12 bytes
    assert picture_size(record(path)) == read_picture(record(path)).image.size == (24, 40)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_sizes_decode_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (40, 24)).save(path)

    def unwanted(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(ImageFile.ImageFile, "load", unwanted)
    assert read_sizes([record(path)], bar=no_progress) == [(40, 24)]


def test_what_cannot_be_read_has_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 24)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    records = [record(tmp_path / name) for name in ("a.png", "bomb.png", "gone.png")]
    assert read_sizes(records, bar=no_progress) == [None, None, None]


@pytest.mark.parametrize("workers", [0, 2])
def test_known_sizes_are_not_read_again(tmp_path: Path, workers: int) -> None:
    for index in range(3):
        Image.new("RGB", (40 + index, 24)).save(tmp_path / f"{index}.png")
    records = [record(tmp_path / f"{index}.png") for index in range(3)]
    known = {"1.png": (7, 7)}
    found = read_sizes(records, workers, no_progress, lambda each: known.get(each.id))
    assert found == [(40, 24), (7, 7), (42, 24)]
