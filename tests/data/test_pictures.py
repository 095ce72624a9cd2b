"""Picture files → RGB → square tensors."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_kit.data import Record
from lora_kit.data.pictures import picture_tensor, read_picture, square_picture
from lora_kit.errors import DataError

ORIENTATION = 0x0112


def record(path: Path) -> Record:
    return Record(f"set/{path.name}", "caption", 0, 1, partial(Image.open, path))


def read(path: Path) -> np.ndarray:
    image = read_picture(record(path)).image
    assert image.mode == "RGB"
    return np.asarray(image)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_pixels_are_untouched_when_no_resize_is_needed(tmp_path: Path) -> None:
    values = noise(16, 16, 3)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = picture_tensor(read_picture(record(tmp_path / "a.png")).image, 16)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    # The equation in float32 numpy: both round correctly, so bits agree.
    expected = values.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(pixels.numpy(), expected)


def test_range_is_minus_one_to_one() -> None:
    for value, expected in ((0, -1.0), (255, 1.0)):
        assert picture_tensor(Image.new("RGB", (8, 8), (value,) * 3), 8).unique().tolist() == [expected]


def test_centre_crop_takes_the_middle_untouched() -> None:
    values = noise(8, 14, 3)
    assert np.array_equal(np.asarray(square_picture(Image.fromarray(values), 8)), values[:, 3:11])


@pytest.mark.parametrize(("place", "rows"), [(0.0, slice(0, 8)), (1.0, slice(6, 14))])
def test_crop_reaches_both_ends(place: float, rows: slice) -> None:
    values = noise(14, 8, 3)
    assert np.array_equal(np.asarray(square_picture(Image.fromarray(values), 8, place, place)), values[rows])


def test_downscaling_is_antialiased() -> None:
    # A one-pixel checkerboard holds no frequency that 1/4 of the size can show: only its mean, 127.5, remains.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = np.asarray(square_picture(Image.fromarray(board).convert("RGB"), 16)).astype(int)
    # Away from the border, where Lanczos-3 sees 12 pixels to each side: within rounding of two 8-bit passes.
    assert np.abs(small[4:-4, 4:-4] - 127.5).max() <= 1.5


def test_resize_keeps_the_aspect_ratio() -> None:
    # A white disc on black, on a canvas twice as wide as high: it stays as wide as high.
    y, x = np.indices((64, 128))
    disc = (((x - 63.5) ** 2 + (y - 31.5) ** 2 < 24**2) * 255).astype(np.uint8)
    small = np.asarray(square_picture(Image.fromarray(disc).convert("RGB"), 32))[..., 0] > 127
    assert small.any(0).sum() == small.any(1).sum()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
@pytest.mark.parametrize(("code", "turned"), [(6, np.rot90), (3, lambda v: np.rot90(v, 2)), (2, np.fliplr)])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, code: int, turned: object) -> None:
    # Four flat quarters survive JPEG: compare signs only. Turning the file back by `turned` must give the original.
    values = np.kron(np.array([[0, 255], [80, 160]], dtype=np.uint8), np.ones((16, 24), dtype=np.uint8))
    upright = np.stack([values] * 3, -1)
    stored = turned(upright)  # pyright: ignore
    exif = Image.Exif()
    exif[ORIENTATION] = code
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a{suffix}", exif=exif, quality=95)
    found = read(tmp_path / f"a{suffix}")
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright)[4:12, 4:20].max() <= 8  # JPEG's error within a flat block


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 51)])  # opaque, clear, a fifth of black
    image.save(tmp_path / "a.png")
    assert read(tmp_path / "a.png")[0].tolist() == [[255, 0, 0], [255, 255, 255], [204, 204, 204]]


def test_opaque_alpha_changes_no_bit(tmp_path: Path) -> None:
    values = np.dstack([noise(16, 16, 3), np.full((16, 16), 255, np.uint8)])
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png"), values[..., :3])


def test_grey_with_alpha(tmp_path: Path) -> None:
    Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 0)]).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png")[0, 0].tolist() == [255, 255, 255]


def test_palette(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png")
    assert read(tmp_path / "a.png")[0].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_palette_with_a_clear_entry(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    assert read(tmp_path / "a.png")[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_colour_key_of_a_grey_picture(tmp_path: Path) -> None:
    image = Image.new("L", (2, 1))
    image.putdata([0, 7])
    image.save(tmp_path / "a.png", transparency=7)
    assert read(tmp_path / "a.png")[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    assert read(tmp_path / f"a{suffix}")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_one_bit_picture(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png")[0].tolist() == [[255] * 3, [0] * 3]


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = (int(value) for value in read(tmp_path / "a.jpg")[8, 8])
    assert red >= 250
    assert max(green, blue) <= 5


def test_float_pictures_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"set/a\.tiff.*mode F has no agreed black and white"):
        read(tmp_path / "a.tiff")


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    picture = read_picture(record(tmp_path / "a.gif"))
    assert picture.animated
    assert picture.image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".tiff", ".bmp"])
def test_truncated_pictures_are_errors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"set/a\{suffix}: not a readable picture"):
        read(path)


def test_damaged_png_data_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(64, 64, 3)).save(path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"set/a\.png: not a readable picture"):
        read(path)


def test_text_under_a_pictures_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(DataError, match=r"set/a\.png: not a readable picture"):
        read(tmp_path / "a.png")


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set/a\.png: the file is missing"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("limit", [100, 200])  # 256 pixels: above twice the limit Pillow raises, above once it warns
def test_decompression_bombs_are_errors(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=rf"set/a\.png: larger than {limit} pixels"):
        read(tmp_path / "a.png")
