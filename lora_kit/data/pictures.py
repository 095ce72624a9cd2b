"""Picture files → RGB → square tensors. Colour profiles are not applied: numbers are taken as sRGB."""

from __future__ import annotations

import struct
import warnings
import zlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lora_kit.data.records import Record
from lora_kit.errors import DataError

# What Pillow's plugins raise on damaged files, besides OSError.
_DAMAGED = (OSError, EOFError, ValueError, SyntaxError, IndexError, KeyError, TypeError, struct.error, zlib.error)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_WHITE = (255, 255, 255, 255)


class Picture(NamedTuple):
    """A decoded picture."""

    image: Image.Image
    """Upright, mode RGB, alpha composited on white."""
    animated: bool
    """The file has several frames; this is the first."""


def read_picture(record: Record) -> Picture:
    """Open and decode a record's picture.

    EXIF orientation is applied; palette, grey, CMYK and 16-bit pictures become 8-bit RGB.
    Raises DataError, naming the record, for anything that cannot be decoded wholly and for decompression bombs.
    """
    reason = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _decode(record)
    except FileNotFoundError:
        reason = "the file is missing"
    except _BOMB:
        limit = Image.MAX_IMAGE_PIXELS or 0
        reason = f"larger than {limit:,} pixels, Pillow's limit against decompression bombs. Scale it down"
    except _DAMAGED as error:
        reason = f"not a readable picture ({error})"
    raise DataError(f"{record.id}: {reason}")


def picture_tensor(image: Image.Image, side: int, across: float = 0.5, down: float = 0.5) -> Tensor:
    """`square_picture` as float32 [3, side, side] in -1..1: x / 127.5 - 1 of each 8-bit value x."""
    values = torch.from_numpy(np.array(square_picture(image, side, across, down)))
    return values.permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1.0)


def square_picture(image: Image.Image, side: int, across: float = 0.5, down: float = 0.5) -> Image.Image:
    """Cut a square out of a picture and scale it to `side` pixels.

    `across` and `down` in 0..1 place the square along the longer side (0.5: centre). The shorter side is scaled
    to `side` by an antialiased Lanczos filter; if it already has that length, pixels are taken as they are.
    """
    short = min(image.size)
    left, top = (image.width - short) * across, (image.height - short) * down
    if short == side:
        return image.crop((round(left), round(top), round(left) + side, round(top) + side))
    box = (left, top, left + short, top + short)
    return image.resize((side, side), Image.Resampling.LANCZOS, box=box)


def _decode(record: Record) -> Picture:
    with record.open() as opened:
        # A phone's MPO is one photograph with a preview behind it, not an animation.
        animated = bool(getattr(opened, "is_animated", False)) and opened.format != "MPO"
        opened.seek(0)
        opened.load()
        return Picture(_to_rgb(ImageOps.exif_transpose(opened)), animated)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image)
    if image.has_transparency_data:
        straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
        image = (image.convert(straight) if straight else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit grey, scaled so that 65535 is 255. Pillow's own conversion clips at 255: nearly all white."""
    values = np.asarray(image)
    if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError(f"mode {image.mode} has no agreed black and white; save it with 8 or 16 bits a channel")
    clear = image.info.get("transparency")
    grey = np.rint(values / 257.0).astype(np.uint8)
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")
