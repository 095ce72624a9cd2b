"""Sources that HF `datasets` reads: hub data sets, saved data sets, parquet / arrow / JSON / CSV files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from lora_kit.data.filters import matching_rows, require_column
from lora_kit.data.folder import caption_flaw
from lora_kit.data.records import Flaw, Record
from lora_kit.data.source import Found, Place, inner_path
from lora_kit.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

TABLE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_SAVED_MARKS = ("state.json", "dataset_dict.json")


class Cell(NamedTuple):
    """Where a picture lies in a data set."""

    table: Dataset
    """The picture column alone, undecoded."""
    row: int
    folder: Path | None
    """What its relative paths are relative to."""


def is_saved(files: Iterable[str]) -> bool:
    """Whether a folder's files are those of `Dataset.save_to_disk` (or a DatasetDict's)."""
    return any(mark in files for mark in _SAVED_MARKS)


def read_hub(place: Place, saved: bool = False) -> Found:
    """All captioned pictures of an HF data set; opens no picture.

    saved: the place is a folder that `save_to_disk` wrote. Raises DataError if the data set cannot be loaded
    or lacks a column.
    """
    import datasets

    table = _load_saved(place) if saved else _load(place)
    section, columns = place.section, table.column_names
    require_column(section.image_column, columns, place.origin, "image_column")
    require_column(section.caption_column, columns, place.origin, "caption_column")
    for name in section.where:
        require_column(name, columns, place.origin, "where")
    kept = matching_rows(section.where, len(table), lambda name: table[name][:], place.origin)
    pictures = table.select_columns([section.image_column])
    if isinstance(table.features[section.image_column], datasets.Image):
        pictures = pictures.cast_column(section.image_column, datasets.Image(decode=False))
    captions = table[section.caption_column][:]
    found = Found()
    folder = place.path if place.path is None or place.path.is_dir() else place.path.parent
    for row in kept:
        found.add(_record(place, Cell(pictures, row, folder), captions[row]))
    return found


def _record(place: Place, cell: Cell, caption: object) -> Record | Flaw:
    record_id = f"{place.label}/row-{cell.row}"
    reason = caption_flaw(caption, f"column {place.section.caption_column!r} is empty")
    if reason:
        return Flaw(record_id, reason)
    return Record(record_id, str(caption).strip(), place.index, place.section.repeats, partial(open_cell, *cell))


def open_cell(table: Dataset, row: int, folder: Path | None) -> Image.Image:
    """Open the picture of a row: bytes, {bytes, path}, or a path within the data set's folder."""
    cell: Any = next(iter(table[row].values()))
    held: Any = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(held, bytes):
        return Image.open(BytesIO(held))
    path = cell.get("path") if isinstance(cell, Mapping) else cell
    if not isinstance(path, str):
        raise UnidentifiedImageError(f"the cell holds {type(cell).__name__}, not a picture, its bytes or its path")
    return Image.open(_picture_path(path, folder))


def _picture_path(path: str, folder: Path | None) -> Path:
    """Only what lies in the data set's folder or in the hub's caches: a data set must not reach for other files."""
    from datasets import config
    from huggingface_hub import constants

    homes = (folder, Path(config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE))
    inner = inner_path(path)
    if inner is not None and folder is not None:
        return folder / inner
    whole = Path(os.path.normpath(path))
    if whole.is_absolute() and any(home is not None and whole.is_relative_to(home) for home in homes):
        return whole
    raise UnidentifiedImageError(
        f"its path {path!r} leaves the data set's folder; embed the pictures (Dataset.save_to_disk does)"
    )


def _load(place: Place) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetsError

    name, files = _builder(place)
    try:
        return datasets.load_dataset(name, place.section.config, split=place.section.split, data_files=files)
    # FileNotFoundError and ConnectionError are OSErrors; unknown configs and splits are ValueErrors, and data
    # sets that are scripts RuntimeErrors.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(_load_message(place, error)) from error


def _builder(place: Place) -> tuple[str, dict[str, str] | None]:
    if place.path is None or place.path.is_dir():
        return str(place.path or place.section.path), None
    builder = TABLE_BUILDERS.get(place.path.suffix.lower())
    if builder is None:
        allowed = ", ".join(TABLE_BUILDERS)
        raise DataError(f"{place.origin}: neither a folder nor a table. Tables end in {allowed}.")
    return builder, {place.section.split: str(place.path)}


def _load_message(place: Place, error: Exception) -> str:
    text = str(error).strip().rstrip(".")
    if place.path is not None:
        return f"{place.origin}: HF datasets cannot load it: {text}."
    return (
        f"{place.origin}: there is no such folder, and HF datasets cannot load a data set of that name: {text}. "
        "A folder is written with its path, relative to the recipe's folder."
    )


def _load_saved(place: Place) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_from_disk(str(place.path))
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise DataError(_load_message(place, error)) from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    split = place.section.split
    if split not in loaded:
        names = [str(name) for name in loaded]
        raise DataError(
            f"{place.origin}: no split {split!r}. Its splits: {', '.join(names)}.{did_you_mean(split, names)}"
        )
    return loaded[split]
