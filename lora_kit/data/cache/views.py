"""Views of pictures: which parts, at which sizes, and the pixels themselves."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image
from torch import Tensor

from lora_kit.data.bucket_places import fits_of
from lora_kit.data.buckets import Size
from lora_kit.data.cache.keys import View
from lora_kit.data.crops import covering_box, pixels_of
from lora_kit.data.records import Record
from lora_kit.recipe import DataSection

_FILTERS = {"lanczos": Image.Resampling.LANCZOS}


class Facts(NamedTuple):
    """What is known of a picture without decoding it again."""

    sha256: bytes
    """Of the file's bytes."""
    width: int
    """Pixels, upright."""
    height: int
    animated: bool
    """The file has several frames; the first is used."""


class SectionViews(NamedTuple):
    """Callable (record, facts) → the views that training on centred crops needs. Can be pickled."""

    section: DataSection
    """That of the training set, whose sources are those of the records."""

    @property
    def versions(self) -> int:
        """Views at each size: the picture and, with `flip`, its mirror image."""
        return 2 if self.section.flip else 1

    def __call__(self, record: Record, facts: Facts) -> list[View]:
        """`versions` for each size that the record is trained at, in the order of `TrainingSet.places`."""
        ground = "white" if record.alpha == "mask" else record.alpha  # what `read_picture` lays it over
        picture = (facts.width, facts.height)
        plain = [view_of(picture, fit.size, ground) for fit in fits_of(record, picture, self.section)]
        return [view._replace(flip=flip) for view in plain for flip in (False, True)[: self.versions]]


def view_of(picture: Size, size: Size, background: str = "white") -> View:
    """The centred part of a picture that has the shape of `size`, scaled to it."""
    return View(*size, covering_box(picture, size), background=background)


def render(image: Image.Image, view: View) -> Tensor:
    """The view's pixels, float32 [3, height, width] in -1..1. `image`: upright and RGB, as `read_picture` gives it."""
    size, box = (view.width, view.height), view.box
    left, top, right, bottom = map(round, box)
    if box == (left, top, right, bottom) and (right - left, bottom - top) == size:
        cut = image.crop((left, top, right, bottom))
    else:
        cut = image.resize(size, _FILTERS[view.resample], box=box)
    pixels = pixels_of(cut)
    return pixels.flip(-1) if view.flip else pixels
