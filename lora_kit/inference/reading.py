"""Files of pictures and masks → what is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from lora_kit.data.pictures import read_picture
from lora_kit.data.records import Record
from lora_kit.models.family.picture_inputs import PictureInputs


def read_inputs(images: Sequence[Path], masks: Sequence[Path]) -> list[PictureInputs]:
    """Each picture with its mask, or with none where there are no masks; as many of both.

    Upright, 8-bit sRGB; what is transparent becomes white in a picture and black (kept) in a mask. Raises DataError for
    what is no readable picture.
    """
    pictures = [_read(path, "white") for path in images]
    greys = [_read(path, "black").convert("L") for path in masks] or [None] * len(pictures)
    return [PictureInputs(image, mask) for image, mask in zip(pictures, greys, strict=True)]


def _read(path: Path, ground: str) -> Image.Image:
    record = Record(str(path), "", source=0, repeats=1, open=partial(Image.open, path), alpha=ground)
    return read_picture(record).image
