"""Two figures that say whether a style was learnt and the subjects kept, from pictures alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

BLUR_RADIUS = 1 / 32  # of the picture's side: strokes a few pixels apart still overlap


class Retrieval(NamedTuple):
    """How often a picture's nearest reference is its own."""

    top1: float
    top5: float
    pictures: int
    """Pictures and references; chance is 1 / pictures and 5 / pictures."""


def mean_saturation(pictures: Sequence[Image.Image]) -> float:
    """Mean HSV saturation over all pixels and pictures, 0..255; black strokes on white have 0.

    Saturation of near-black pixels is noise (1 part in 3 of RGB (3, 2, 2)), so it is weighted by value:
    max - min of R, G, B, the chroma.
    """
    arrays = [np.asarray(p.convert("RGB"), dtype=np.int16) for p in pictures]
    return float(np.mean([(a.max(-1) - a.min(-1)).mean() for a in arrays]))


def blurred(picture: Image.Image, side: int, gray: bool) -> NDArray[np.float32]:
    """The picture at `side` pixels, Gaussian-blurred, as a flat vector of zero mean and unit norm."""
    small = picture.convert("L" if gray else "RGB").resize((side, side), Image.Resampling.BOX)
    values = np.asarray(small.filter(ImageFilter.GaussianBlur(side * BLUR_RADIUS)), dtype=np.float32).ravel()
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-6)


def retrieval(pictures: Sequence[Image.Image], references: Sequence[Image.Image], gray: bool = False) -> Retrieval:
    """Picture i belongs to reference i. Distance: Euclidean between blurred, normalised pixels.

    With unit vectors that is the order of the (negative) correlation, so brightness and contrast of a
    whole picture do not count.
    """
    side = min(references[0].size)
    drawn = np.stack([blurred(p, side, gray) for p in pictures])
    known = np.stack([blurred(p, side, gray) for p in references])
    likeness = drawn @ known.T
    # Another reference that is just as near counts against the picture: a blank one is equally near to all.
    ranks = (likeness >= np.diag(likeness)[:, None]).sum(1) - 1
    return Retrieval(float((ranks < 1).mean()), float((ranks < 5).mean()), len(references))
