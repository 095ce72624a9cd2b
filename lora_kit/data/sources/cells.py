"""Cells of HF data sets that hold a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from lora_kit.data.sources.source import Links, inner_path

if TYPE_CHECKING:
    from datasets import Dataset


class Cell(NamedTuple):
    """Where a picture lies in a data set."""

    table: Dataset
    """The picture column alone, undecoded."""
    row: int
    folder: Path | None
    """What its relative paths are relative to."""


def open_cell(table: Dataset, row: int, folder: Path | None) -> Image.Image:
    """Open the picture of a row: bytes, {bytes, path}, or a path within the data set's folder."""
    cell: Any = next(iter(table[row].values()))
    held: Any = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(held, bytes):
        return Image.open(BytesIO(held))
    path = cell.get("path") if isinstance(cell, Mapping) else cell
    if not isinstance(path, str):
        raise UnidentifiedImageError(f"the cell holds {type(cell).__name__}, not a picture, its bytes or its path")
    return Image.open(picture_path(path, folder))


def picture_path(path: str, folder: Path | None) -> Path:
    """Only what lies in the data set's folder or in the hub's caches: a data set must not reach for other files."""
    from datasets import config
    from huggingface_hub import constants

    homes = (folder, Path(config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE))
    inner = inner_path(path)
    if inner is not None and folder is not None and not Links(folder).leave(inner):
        return folder / inner
    real = Path(os.path.realpath(path))
    if Path(path).is_absolute() and any(home and real.is_relative_to(os.path.realpath(home)) for home in homes):
        return real
    raise UnidentifiedImageError(
        f"its path {path!r} leaves the data set's folder; embed the pictures (Dataset.save_to_disk does)"
    )
