"""A record is one captioned picture, not yet opened; `Records` are all that a recipe's sources hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, overload

from PIL import Image

from lora_kit.errors import DataError

MAX_NAMED = 10


class Flaw(NamedTuple):
    """A record that cannot be used."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Record:
    """One captioned picture."""

    id: str
    """Source's name and the path within it, `line/1F34E.png`, or `line/row-12` of an HF data set."""
    caption: str
    source: int
    """Index in `data.sources`."""
    repeats: int
    """Appearances in an epoch."""
    open: Callable[[], Image.Image]
    """Opens the picture (Pillow reads the header only). Can be pickled."""
    captions: tuple[str, ...] = ()
    """All its captions, where it has several; `caption` is the first."""
    is_regularisation: bool = False
    """Keeps what the base knows of a class; no example of the subject."""
    loss_weight: float = 1.0
    """Factor of this picture's loss."""
    alpha: str = "white"
    """What `read_picture` does with transparency, as the recipe's `data.alpha` says it."""
    mask: Callable[[], Image.Image] | None = None
    """Opens the picture's mask, as `open`."""
    from_base: bool = False
    """The target is the base model's own prediction, not the picture's noise."""

    @property
    def is_masked(self) -> bool:
        """Whether its picture may have a mask."""
        return self.mask is not None or self.alpha == "mask"


@dataclass
class Records(Sequence[Record]):
    """The usable records of all sources, in a stable order, and what was found beside them."""

    items: list[Record]
    skipped: list[Flaw] = field(default_factory=list[Flaw])
    """Left out under `on_error: skip`."""
    notices: list[str] = field(default_factory=list[str])
    """What the user should be told once, such as pictures that the metadata does not name."""

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        return self.items[index]


def settle_flaws(flaws: Sequence[Flaw], remaining: int, on_error: str, all_known: bool = True) -> None:
    """Raise a DataError that names the flaws if `on_error` is `raise`, or if nothing usable remains.

    all_known: False where the search stopped early, so that there may be more.
    """
    if not flaws or (on_error == "skip" and remaining):
        return
    lines = [f"  {flaw.id}: {flaw.reason}" for flaw in flaws[:MAX_NAMED]]
    if len(flaws) > MAX_NAMED:
        lines.append(f"  … and {len(flaws) - MAX_NAMED} more")
    listed = "\n".join(lines)
    if on_error == "skip":
        raise DataError(f"No usable picture remains; {_count(len(flaws))} skipped:\n{listed}\nMend the data.")
    least = "" if all_known else "At least "
    raise DataError(
        f"{least}{_count(len(flaws))} of the data set cannot be used:\n{listed}\n"
        "Mend them, or set data.on_error to skip to train without them."
    )


def fingerprint(records: Iterable[Record]) -> str:
    """SHA-256 over ids, captions and repeats in order: equal exactly when the sources hand over the same."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr((record.id, record.caption, record.repeats, *record.captions)).encode())
    return digest.hexdigest()


def name_some(names: Sequence[str], count: int = 3) -> str:
    """`a, b, c, …`."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _count(flaws: int) -> str:
    return "1 record" if flaws == 1 else f"{flaws} records"
