"""What every kind of source is given and hands back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from lora_kit.data.records import Flaw, Record
from lora_kit.data.sources.texts import Texts
from lora_kit.recipe.sections import SourceSection

PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}  # all in Pillow's wheels
)
FOREIGN_SUFFIXES = frozenset({".heic", ".heif", ".svg", ".psd", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf"})


@dataclass(frozen=True)
class Place:
    """A source and where it was found."""

    section: SourceSection
    index: int
    """Index in `data.sources`."""
    label: str
    """First part of its records' ids, unique among the sources."""
    path: Path | None
    """File, folder or pattern, absolute; None for a data set of the hub."""
    alpha: str = "white"
    """What becomes of transparency: the source's or, without one, the data set's."""

    @property
    def origin(self) -> str:
        """How messages name it."""
        return f"data.sources.{self.index} ({self.path or self.section.path})"

    def record(self, inner: str, texts: Texts, opener: Callable[[], Image.Image]) -> Record:
        """The record called `inner` within this source."""
        section = self.section
        return Record(
            id=f"{self.label}/{inner}",
            caption=texts.caption,
            source=self.index,
            repeats=section.repeats,
            open=opener,
            captions=texts.captions,
            is_regularisation=section.regularisation,
            loss_weight=section.loss_weight,
            alpha=self.alpha,
            from_base=section.target == "base",
        )


@dataclass
class Found:
    """What a source holds."""

    records: list[Record] = field(default_factory=list[Record])
    flaws: list[Flaw] = field(default_factory=list[Flaw])
    notices: list[str] = field(default_factory=list[str])
    kind: str = ""
    """How it was read: `caption files`, `3 tar shards`."""

    def add(self, result: Record | Flaw) -> None:
        """Sort a result into records or flaws."""
        if isinstance(result, Record):
            self.records.append(result)
        else:
            self.flaws.append(result)


def picture_opener(folder: Path, inner: str) -> Callable[[], Image.Image]:
    """What opens the picture at a relative POSIX path. Holds text: a Path is three times as large and slow to make."""
    return partial(Image.open, f"{folder}/{inner}")


def list_files(folder: Path) -> list[str]:
    """All files below `folder` as sorted POSIX paths relative to it.

    Hidden files and folders (`.name`: thumbnails, macOS's `._` twins) are no part of a data set. Linked folders
    are followed once.
    """
    found: list[str] = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            inner = Path(root).relative_to(folder)
            found += [(inner / name).as_posix() for name in files if not name.startswith(".")]
        seen.add(real)
    return sorted(found)


def inner_path(name: str) -> str | None:
    """A relative POSIX path in normal form, or None if it is absolute or leaves its folder."""
    plain = name.replace("\\", "/") if os.name == "nt" else name
    normal = os.path.normpath(plain).replace(os.sep, "/")
    leaves = normal == ".." or normal.startswith("../")
    return None if leaves or Path(normal).is_absolute() or Path(normal).drive else normal


class Links:
    """Tells whether a name in a folder leads out of it through a link. A downloaded data set must not reach for
    other files of this machine; those of the hub's cache, which are links by its design, are the data set's own."""

    def __init__(self, folder: Path):
        from huggingface_hub import constants

        self.folder = folder
        self.homes = tuple(Path(os.path.realpath(home)) for home in (folder, constants.HF_HUB_CACHE))
        self.parents: dict[str, bool] = {}

    def leave(self, inner: str) -> bool:
        """Whether the relative path `inner`, in normal form, ends outside. Costs one look at the file, no more."""
        parent, _, name = inner.rpartition("/")
        if parent not in self.parents:
            self.parents[parent] = self._outside(self.folder / parent)
        path = self.folder / parent / name
        return self._outside(path) if path.is_symlink() else self.parents[parent]

    def _outside(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return not any(real.is_relative_to(home) for home in self.homes)


def has_suffix(name: str, suffixes: frozenset[str]) -> bool:
    """Whether a file's ending, in any case, is one of `suffixes`."""
    return os.path.splitext(name)[1].lower() in suffixes  # noqa: PTH122 (called for every file: Path takes ten times)
