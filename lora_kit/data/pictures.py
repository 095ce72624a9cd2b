"""Picture files → RGB → tensors."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, PngImagePlugin, TiffImagePlugin

from lora_kit.data.buckets import Size
from lora_kit.data.crops import cut_picture, pixels_of
from lora_kit.data.masks import joined_mask
from lora_kit.data.profiles import to_srgb
from lora_kit.data.records import Record
from lora_kit.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

# What Pillow's plugins raise on damaged files, besides OSError.
_DAMAGED = (OSError, EOFError, ValueError, SyntaxError, IndexError, KeyError, TypeError, struct.error, zlib.error)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_ON_THEIR_SIDE = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height
_TAIL = 1 << 16
_ORIENTATION_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
T = TypeVar("T")


class Picture(NamedTuple):
    """A decoded picture."""

    image: Image.Image
    """Upright, mode RGB, sRGB, alpha composited as the record says."""
    animated: bool
    """The file has several frames; this is the first."""
    mask: Image.Image | None = None
    """What counts of it, mode L and of the image's size, white in full: its own mask, its alpha where the record asks
    for that (`alpha: mask`), or their product. None: all of it."""
    note: str = ""
    """What was wrong but did not keep it from being read: a broken colour profile."""


def read_picture(record: Record) -> Picture:
    """Open and decode a record's picture.

    EXIF orientation is applied; palette, grey, CMYK and 16-bit pictures become 8-bit RGB. Colours under an embedded
    profile other than sRGB are converted to sRGB; without a profile numbers are taken as sRGB. Transparency goes as
    `record.alpha` says.
    Raises DataError, naming the record, for anything that cannot be decoded wholly and for decompression bombs; for a
    mask of another shape, and for one that is black everywhere.
    """
    picture = _guarded(record, lambda: _decode(record))
    if record.mask is not None:
        own = _guarded(record, lambda: _decode_mask(record, picture.image.size), "its mask: ")
        picture = picture._replace(mask=joined_mask(picture.mask, own))
    if picture.mask is not None and picture.mask.getextrema()[1] == 0:
        raise DataError(f"{record.id}: its mask is black everywhere, so that nothing of it would be learnt")
    return picture


def _guarded(record: Record, decode: Callable[[], T], what: str = "") -> T:
    """`decode()`, with what Pillow raises as a DataError."""
    reason = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return decode()
    except FileNotFoundError:
        reason = "the file is missing"
    except _BOMB:
        limit = Image.MAX_IMAGE_PIXELS or 0
        reason = f"larger than {limit:,} pixels, Pillow's limit against decompression bombs. Scale it down"
    except _DAMAGED as error:
        reason = f"not a readable picture ({error})"
    raise DataError(f"{record.id}: {what}{reason}")


def picture_tensor(image: Image.Image, side: int, across: float = 0.5, down: float = 0.5) -> Tensor:
    """`square_picture` as float32 [3, side, side] in -1..1: x / 127.5 - 1 of each 8-bit value x."""
    return pixels_of(square_picture(image, side, across, down))


def square_picture(image: Image.Image, side: int, across: float = 0.5, down: float = 0.5) -> Image.Image:
    """Cut a square out of a picture and scale it to `side` pixels.

    `across` and `down` in 0..1 place the square along the longer side (0.5: centre). The shorter side is scaled
    to `side` by an antialiased Lanczos filter; if it already has that length, pixels are taken as they are.
    """
    return cut_picture(image, (side, side), across, down)


def picture_size(record: Record) -> Size | None:
    """Width and height that `read_picture` would give, from the file's header alone; None for what it would refuse.

    Whether the rest can be decoded is not looked at.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with record.open() as opened:
                width, height = _stored_size(opened)
                turned = _orientation(opened) in _ON_THEIR_SIDE
    except (*_BOMB, *_DAMAGED):
        return None
    return (height, width) if turned else (width, height)


def _stored_size(opened: Image.Image) -> Size:
    """Before it is turned upright: the size that Pillow says of a TIFF is (seen in 13.0) that of the upright one."""
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        return opened.tag_v2[TiffImagePlugin.IMAGEWIDTH], opened.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return opened.size


def _orientation(opened: Image.Image) -> int | None:
    """As `ImageOps.exif_transpose` reads it, without decoding: for PNG, Pillow does that if there is none before the
    pixels. One behind them lies near the end, as do the texts that may hold it; only such a file is decoded."""
    file = getattr(opened, "fp", None)
    if not isinstance(opened, PngImagePlugin.PngImageFile) or "exif" in opened.info or file is None:
        return opened.getexif().get(ExifTags.Base.Orientation)
    place = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
    tail = file.read()
    file.seek(place)
    late = any(mark in tail for mark in _ORIENTATION_MARKS)
    exif = opened.getexif() if late else Image.Image.getexif(opened)
    return exif.get(ExifTags.Base.Orientation)


def _decode(record: Record) -> Picture:
    with record.open() as opened:
        # A phone's MPO is one photograph with a preview behind it, not an animation.
        animated = bool(getattr(opened, "is_animated", False)) and opened.format != "MPO"
        opened.seek(0)
        opened.load()
        profile = opened.info.get("icc_profile")
        image, alpha = _split(ImageOps.exif_transpose(opened))
    image, note = to_srgb(image, profile) if profile else (image.convert("RGB"), "")
    if alpha is None:
        return Picture(image, animated, None, note)
    asks_mask = record.alpha == "mask"
    ground = Image.new("RGBA", image.size, ImageColor.getrgb("white" if asks_mask else record.alpha))
    image.putalpha(alpha)
    flat = Image.alpha_composite(ground, image).convert("RGB")
    return Picture(flat, animated, alpha if asks_mask else None, note)


def _decode_mask(record: Record, size: Size) -> Image.Image:
    """The record's mask file as brightness, upright and in the picture's size."""
    assert record.mask is not None
    with record.mask() as opened:
        opened.seek(0)
        opened.load()
        colours, alpha = _split(ImageOps.exif_transpose(opened))
    grey = colours.convert("L")
    if alpha is not None:  # what is transparent does not count, whatever colour lies under it
        grey = joined_mask(alpha, grey) or grey
    if grey.size == size:
        return grey
    # Another resolution of the same shape will do: a side may be off by the rounding of the smaller one.
    (width, height), (own_width, own_height) = size, grey.size
    if abs(own_width * height - own_height * width) > max(width, height):
        said = f"{own_width} × {own_height} pixels, the picture {width} × {height}: another shape"
        raise DataError(f"{record.id}: its mask has {said}. Cut it as the picture is cut")
    return grey.resize(size, Image.Resampling.BOX if own_width > width else Image.Resampling.BILINEAR)


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours, in a mode of 8 bits that a colour profile can be about (L, RGB, CMYK), and the alpha (L)."""
    if image.mode.startswith("I") or image.mode == "F":
        return _split_deep_grey(image)
    if image.has_transparency_data:
        straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
        whole = (image.convert(straight) if straight else image).convert("RGBA")
        return whole.convert("RGB"), whole.getchannel("A")
    kept = image.mode in ("L", "RGB", "CMYK")
    return image if kept else image.convert("L" if image.mode == "1" else "RGB"), None


def _split_deep_grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey, scaled so that 65535 is 255. Pillow's own conversion clips at 255: nearly all white."""
    values = np.asarray(image)
    if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError(f"mode {image.mode} has no agreed black and white; save it with 8 or 16 bits a channel")
    grey = Image.fromarray(np.rint(values / 257.0).astype(np.uint8))
    clear = image.info.get("transparency")
    return grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)) if isinstance(clear, int) else None
