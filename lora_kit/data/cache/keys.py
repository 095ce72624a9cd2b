"""What an entry of the cache is found by: a hash of everything that its numbers depend on.

Not in a key: the device and the versions of PyTorch and Pillow. They change the last bits of a latent (JPEG
decoders may differ by one level of 255), and a cache that every upgrade empties would help nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

KEY_BYTES = 32
FORMAT = 2
"""Raise it when the same key would stand for other numbers: a change of decoding, cropping or what is stored."""

StoredDtype = Literal["fp32", "fp16"]


class View(NamedTuple):
    """How a picture becomes pixels: a box is cut out, scaled to `width` × `height`, and mirrored or not."""

    width: int
    """Pixels, of what the VAE sees."""
    height: int
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the upright picture."""
    flip: bool = False
    resample: str = "lanczos"
    """Name of the scaling filter."""
    background: str = "white"
    """What transparent pictures are laid over; `mask`: white, and their alpha is a mask."""
    mask: int = 0
    """Pixels of the side of the squares that a mask is averaged over. 0: no mask is kept."""


def latent_key(picture: bytes, view: View, vae: str, stored: StoredDtype) -> bytes:
    """The key of a picture's latent distribution, 32 bytes.

    picture: `Facts.sha256`; vae: `vae_fingerprint`; stored: precision on disk.
    """
    box = (repr(float(edge) + 0.0) for edge in view.box)  # 3 is 3.0, and -0.0 is 0.0
    shape = (str(view.width), str(view.height), str(int(view.flip)), view.resample, view.background, str(view.mask))
    return _hash("latent", (picture.hex(), *shape, *box, vae, stored))


def text_key(caption: str, encoder: str, tokenizer: str, options: Mapping[str, str | int]) -> bytes:
    """The key of a caption's text states, 32 bytes.

    encoder, tokenizer: their fingerprints; options: whatever else decides the states, by name, such as the
    autocast precision, clip skip, or how long captions are cut.
    """
    named = (part for name in sorted(options) for part in (name, repr(options[name])))
    return _hash("text", (caption, encoder, tokenizer, *named))


def _hash(kind: str, parts: Iterable[str]) -> bytes:
    """SHA-256 over netstrings (length:bytes,), so that no two lists of parts run together the same way."""
    digest = hashlib.sha256()
    for part in (kind, str(FORMAT), *parts):
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:%b," % (len(raw), raw))
    return digest.digest()
