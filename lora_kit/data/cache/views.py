"""Views of pictures: which parts, at which sizes, and the pixels themselves."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image
from torch import Tensor

from lora_kit.data.bucket_places import fits_of
from lora_kit.data.buckets import Size
from lora_kit.data.cache.keys import View
from lora_kit.data.crops import covering_box, pixels_of
from lora_kit.data.masks import mask_cells
from lora_kit.data.pictures import Picture
from lora_kit.data.records import Record
from lora_kit.recipe import DataSection

_FILTERS = {"lanczos": Image.Resampling.LANCZOS}


class Facts(NamedTuple):
    """What is known of a picture without decoding it again."""

    sha256: bytes
    """Of the file's bytes; where there is a mask, of its too (`origin.digest`)."""
    width: int
    """Pixels, upright."""
    height: int
    animated: bool
    """The file has several frames; the first is used."""


class Rendered(NamedTuple):
    """One view of a picture."""

    view: View
    pixels: Tensor
    """float32 [3, height, width] in -1..1."""
    mask: Tensor | None
    """float32 [h, w] in 0..1 over the latent's cells, if the picture has one."""


class SectionViews(NamedTuple):
    """Callable (record, facts) → the views that training on centred crops needs. Can be pickled."""

    section: DataSection
    """That of the training set, whose sources are those of the records."""
    latent_factor: int = 8
    """As TrainingSet's."""

    @property
    def versions(self) -> int:
        """Views at each size: the picture and, with `flip`, its mirror image."""
        return 2 if self.section.flip else 1

    def __call__(self, record: Record, facts: Facts) -> list[View]:
        """`versions` for each size that the record is trained at, in the order of `TrainingSet.places`."""
        picture = (facts.width, facts.height)
        mask = self.latent_factor if record.is_masked else 0
        fits = fits_of(record, picture, self.section)
        plain = [view_of(picture, fit.size, record.alpha)._replace(mask=mask) for fit in fits]
        return [view._replace(flip=flip) for view in plain for flip in (False, True)[: self.versions]]


def view_of(picture: Size, size: Size, background: str = "white") -> View:
    """The centred part of a picture that has the shape of `size`, scaled to it."""
    return View(*size, covering_box(picture, size), background=background)


def render(picture: Picture, view: View) -> Rendered:
    """The view's pixels and, if it asks for one, its mask."""
    pixels, mask = _pixels(picture.image, view), None
    if picture.mask is not None and view.mask:
        mask = mask_cells(picture.mask, view.box, (view.width, view.height), view.mask)
    if view.flip:
        pixels, mask = pixels.flip(-1), None if mask is None else mask.flip(-1)
    return Rendered(view, pixels, mask)


def _pixels(image: Image.Image, view: View) -> Tensor:
    size, box = (view.width, view.height), view.box
    left, top, right, bottom = map(round, box)
    if box == (left, top, right, bottom) and (right - left, bottom - top) == size:
        cut = image.crop((left, top, right, bottom))
    else:
        cut = image.resize(size, _FILTERS[view.resample], box=box)
    return pixels_of(cut)
