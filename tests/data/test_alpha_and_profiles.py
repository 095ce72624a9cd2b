"""What becomes of transparency, of colour profiles, and of every kind of file that painters have."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from lora_kit.data import Record
from lora_kit.data.pictures import Picture, read_picture
from lora_kit.data.profiles import to_srgb

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RED = (255, 0, 0)
WHITE = (255, 255, 255)


def read(path: Path, alpha: str = "white") -> Picture:
    return read_picture(replace(Record(f"set/{path.name}", "caption", 0, 1, partial(Image.open, path)), alpha=alpha))


def first_row(picture: Picture) -> list[list[int]]:
    assert picture.image.mode == "RGB"
    return np.asarray(picture.image)[0].tolist()


def clear_and_red(path: Path) -> Path:
    """A red pixel, a clear one, and a fifth of black."""
    values = np.array([[[255, 0, 0, 255], [9, 9, 9, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("alpha", "clear", "fifth"),
    [
        ("white", [255, 255, 255], [204, 204, 204]),
        ("black", [0, 0, 0], [0, 0, 0]),
        ("#0A64c8", [10, 100, 200], [8, 80, 160]),  # 4/5 of it
        ("mask", [255, 255, 255], [204, 204, 204]),
    ],
)
def test_alpha_is_put_on_the_chosen_colour(tmp_path: Path, alpha: str, clear: list[int], fifth: list[int]) -> None:
    assert first_row(read(clear_and_red(tmp_path / "a.png"), alpha)) == [[255, 0, 0], clear, fifth]


def test_the_mask_is_the_alpha(tmp_path: Path) -> None:
    mask = read(clear_and_red(tmp_path / "a.png"), "mask").mask
    assert mask is not None
    assert mask.mode == "L"
    assert np.asarray(mask).tolist() == [[255, 0, 51]]


def test_only_what_is_asked_for_and_there_is_a_mask(tmp_path: Path) -> None:
    assert read(clear_and_red(tmp_path / "a.png")).mask is None
    Image.new("RGB", (2, 1)).save(tmp_path / "b.png")
    assert read(tmp_path / "b.png", "mask").mask is None


def test_the_mask_is_turned_with_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: upright after a quarter turn clockwise
    Image.open(clear_and_red(tmp_path / "a.png")).save(tmp_path / "b.png", exif=exif)
    mask = read(tmp_path / "b.png", "mask").mask
    assert mask is not None
    assert np.asarray(mask).tolist() == [[255], [0], [51]]


def png(colour_type: int, depth: int, row: bytes, width: int) -> bytes:
    """A PNG of one row, written by hand: what Pillow itself cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"\0" + row)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def palette(clear: int | None) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 40, 50, 60])
    image.putdata([0, 1])
    buffer = BytesIO()
    image.save(buffer, "PNG", **({} if clear is None else {"transparency": clear}))
    return buffer.getvalue()


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def grey_alpha() -> Image.Image:
    return Image.merge("LA", [Image.new("L", (2, 1), 100), Image.fromarray(np.array([[255, 0]], dtype=np.uint8))])


FILES: dict[str, tuple[bytes, list[list[int]]]] = {
    # 16 bits a channel: the high byte (257 · v is v exactly).
    "rgb16.png": (
        png(2, 16, struct.pack(">6H", 257 * 200, 0, 65535, 257 * 10, 257, 0), 2),
        [[200, 0, 255], [10, 1, 0]],
    ),
    "rgba16.png": (png(6, 16, struct.pack(">8H", 65535, 0, 0, 65535, 9, 9, 9, 0), 2), [[255, 0, 0], [255, 255, 255]]),
    "grey16.png": (png(0, 16, struct.pack(">2H", 257 * 128, 65535), 2), [[128] * 3, [255] * 3]),
    "grey2.png": (png(0, 2, bytes([0b01110000]), 2), [[85] * 3, [255] * 3]),
    "one-bit.png": (saved(Image.fromarray(np.array([[True, False]])), "PNG"), [[255] * 3, [0] * 3]),
    "palette.png": (palette(None), [[255, 0, 0], [40, 50, 60]]),
    "clear-entry.png": (palette(1), [[255, 0, 0], [255, 255, 255]]),
    "grey-alpha.png": (saved(grey_alpha(), "PNG"), [[100] * 3, [255] * 3]),
    "cmyk.tiff": (saved(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF"), [[255, 0, 0]] * 2),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_becomes_rgb_knowingly(tmp_path: Path, name: str) -> None:
    content, expected = FILES[name]
    (tmp_path / name).write_bytes(content)
    picture = read(tmp_path / name)
    assert first_row(picture) == expected
    assert not picture.note


def test_cmyk_jpeg_of_photoshop_is_inverted(tmp_path: Path) -> None:
    # Photoshop stores ink upside down and says so in an Adobe marker; taken as it is, paper would be black.
    content = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in content[:64]
    (tmp_path / "a.jpg").write_bytes(content)
    red, green, blue = read(tmp_path / "a.jpg").image.getpixel((8, 8))  # pyright: ignore
    assert red >= 250
    assert max(green, blue) <= 5


def test_animated_png_and_webp_give_the_first_frame_and_say_so(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 255, 0))]
    for name in ("a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        picture = read(tmp_path / name)
        assert picture.animated
        assert picture.image.getpixel((0, 0)) == RED


def xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in (x, y, z)))


def matrix_profile(columns: dict[str, tuple[float, float, float]], gamma: float, space: bytes = b"RGB ") -> bytes:
    """A display profile of version 2, written by hand: columns of the matrix to XYZ (D50), one gamma for all."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    name = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    text = b"text\0\0\0\0none\0\0\0\0"
    tags = {b"desc": name + bytes(-len(name) % 4), b"cprt": text, b"wtpt": xyz(0.9642, 1.0, 0.8249)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {f"{c}XYZ".encode(): xyz(*columns[c]) for c in "rgb"} | {f"{c}TRC".encode(): curve for c in "rgb"}
    table, data, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + struct.pack(">II", offset + len(data), len(content))
        data += content
    size = offset + len(data)
    date = struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
    head = struct.pack(">I4sI4s4s4s12s4s", size, b"\0\0\0\0", 0x02100000, b"mntr", space, b"XYZ ", date, b"acsp")
    rest = bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return (head + rest).ljust(128, b"\0") + table + data


# Bradford-adapted to D50, as the profiles in use have them (lindbloom.com; Display P3 of Apple).
ADOBE_RGB = {"r": (0.60974, 0.31111, 0.01947), "g": (0.20528, 0.62567, 0.06087), "b": (0.14919, 0.06322, 0.74457)}
SRGB_D50 = {"r": (0.43607, 0.22249, 0.01392), "g": (0.38515, 0.71687, 0.09708), "b": (0.14307, 0.06061, 0.71410)}


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, 0..255."""
    clipped = linear.clip(0, 1)
    return 255 * np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)


def test_adobe_rgb_becomes_srgb(tmp_path: Path) -> None:
    values = np.array([[[200, 100, 50], [128, 128, 128], [90, 150, 140]]], dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=matrix_profile(ADOBE_RGB, 563 / 256))
    # The same by the equations: gamma, matrix to XYZ, matrix of sRGB back, sRGB's curve.
    to_xyz = np.array([ADOBE_RGB[c] for c in "rgb"]).T
    from_xyz = np.linalg.inv(np.array([SRGB_D50[c] for c in "rgb"]).T)
    expected = encode_srgb((values[0] / 255) ** (563 / 256) @ to_xyz.T @ from_xyz.T)
    picture = read(tmp_path / "a.png")
    assert not picture.note
    # A level for rounding to 8 bits, and one for the engine's 16-bit matrices and curves.
    assert np.abs(np.asarray(picture.image)[0] - expected).max() <= 2
    assert np.abs(np.asarray(picture.image)[0, 0].astype(int) - values[0, 0]).max() > 10


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("profile", [None, SRGB, matrix_profile(SRGB_D50, 2.2)], ids=["none", "sRGB", "near"])
def test_no_profile_and_srgb_change_no_bit(tmp_path: Path, profile: bytes | None) -> None:
    values = noise()
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=profile)
    same = np.array_equal(np.asarray(read(tmp_path / "a.png").image), values)
    # A plain gamma of 2.2 is no sRGB: it differs in the darks, and is converted.
    assert same == (profile is None or profile == SRGB)


def test_grey_with_a_profile(tmp_path: Path) -> None:
    values = np.array([[0, 64, 128, 255]], dtype=np.uint8)
    profile = matrix_profile({}, 1.0, b"GRAY")
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=profile)
    expected = encode_srgb(values[0] / 255.0)
    assert np.abs(np.asarray(read(tmp_path / "a.png").image)[0, :, 0] - expected).max() <= 2


def test_alpha_stays_beside_converted_colours(tmp_path: Path) -> None:
    profile = matrix_profile(ADOBE_RGB, 563 / 256)
    Image.fromarray(np.array([[[255, 255, 255, 255], [9, 9, 9, 0]]], dtype=np.uint8)).save(
        tmp_path / "a.png", icc_profile=profile
    )
    assert first_row(read(tmp_path / "a.png", "black")) == [[255, 255, 255], [0, 0, 0]]


@pytest.mark.parametrize("profile", [b"nonsense", SRGB[:200], matrix_profile({}, 2.2, b"GRAY")])
def test_a_broken_or_unfitting_profile_is_left_aside_with_a_note(tmp_path: Path, profile: bytes) -> None:
    values = noise()
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=profile)
    picture = read(tmp_path / "a.png")
    assert np.array_equal(np.asarray(picture.image), values)
    assert picture.note.startswith("its colour profile cannot be used")
    assert picture.note.endswith("its numbers are taken as sRGB")


def test_grey_that_kept_the_profile_of_its_rgb_is_read_by_it() -> None:
    grey = Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8))
    profile = matrix_profile(SRGB_D50, 1.0)
    converted, note = to_srgb(grey, profile)
    assert not note
    assert np.asarray(converted)[0, 1].tolist() == [188] * 3  # sRGB's curve of 128 / 255 in linear light
