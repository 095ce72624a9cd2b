"""Sources that HF `datasets` reads: hub data sets, saved data sets, parquet / arrow / JSON / CSV files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_kit.data.records import Flaw, Record
from lora_kit.data.sources.cells import Cell, open_cell
from lora_kit.data.sources.filters import matching_rows, require_column
from lora_kit.data.sources.masks import tell_masks
from lora_kit.data.sources.source import Found, Place
from lora_kit.data.sources.stream import read_stream
from lora_kit.data.sources.texts import as_needed, texts_in
from lora_kit.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

TABLE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_SAVED_MARKS = ("state.json", "dataset_dict.json")


def is_saved(files: Iterable[str]) -> bool:
    """Whether a folder's files are those of `Dataset.save_to_disk` (or a DatasetDict's)."""
    return any(mark in files for mark in _SAVED_MARKS)


def read_hub(place: Place, saved: bool = False) -> Found:
    """All captioned pictures of an HF data set; opens no picture.

    saved: the place is a folder that `save_to_disk` wrote. Raises DataError if the data set cannot be loaded
    or lacks a column.
    """

    _refuse_unused(place, saved)
    table = _load_saved(place) if saved else _load(place)
    section, columns = place.section, table.column_names
    require_column(section.image_column, columns, place.origin, "image_column")
    if section.reads_captions:
        require_column(section.caption_column, columns, place.origin, "caption_column")
    if section.mask_column is not None:
        require_column(section.mask_column, columns, place.origin, "mask_column")
    for name in section.where:
        require_column(name, columns, place.origin, "where")
    kept = matching_rows(section.where, len(table), lambda name: table[name][:], place.origin)
    pictures = _undecoded(table, section.image_column)
    masks = _undecoded(table, section.mask_column) if section.mask_column is not None else None
    captions = table[section.caption_column][:] if section.caption_column in columns else [None] * len(table)
    found = Found(kind=_kind(place, saved))
    folder = place.path if place.path is None or place.path.is_dir() else place.path.parent
    for row in kept:
        result = _record(place, Cell(pictures, row, folder), captions[row])
        if isinstance(result, Record) and masks is not None and not _is_empty(masks, row):
            result = replace(result, mask=partial(open_cell, *Cell(masks, row, folder)))
        found.add(result)
    if masks is not None:
        tell_masks(place, found, ())
    return found


def _kind(place: Place, saved: bool) -> str:
    if saved:
        return "saved data set"
    if place.path is None:
        return "hub data set"
    return "data set folder" if place.path.is_dir() else f"{place.path.suffix.lower().lstrip('.')} file"


def _undecoded(table: Dataset, column: str) -> Dataset:
    """One column of pictures, alone."""
    import datasets

    pictures = table.select_columns([column])
    if isinstance(table.features[column], datasets.Image):
        pictures = pictures.cast_column(column, datasets.Image(decode=False))
    return pictures


def _is_empty(table: Dataset, row: int) -> bool:
    """Whether the one cell of a row holds nothing; reads it."""
    cell: Any = next(iter(table[row].values()))
    return cell is None or cell == "" or (isinstance(cell, Mapping) and not any(cell.values()))


def _record(place: Place, cell: Cell, caption: object) -> Record | Flaw:
    inner, section = f"row-{cell.row}", place.section
    found = texts_in(caption, f"column {section.caption_column!r} is empty", section.caption_fallback)
    texts = as_needed(section, found)
    if isinstance(texts, str):
        return Flaw(f"{place.label}/{inner}", texts)
    return place.record(inner, texts, partial(open_cell, *cell))


def _refuse_unused(place: Place, saved: bool) -> None:
    section = place.section
    unused = [
        name
        for name, is_set in {
            "metadata_file": section.metadata_file is not None,
            "caption_suffix": section.caption_suffix is not None,
            "mask_folder": section.mask_folder is not None,
            "mask_suffix": section.mask_suffix is not None,
            "layout": section.layout == "kohya",
            "streaming": section.streaming and saved,
        }.items()
        if is_set
    ]
    if unused:
        kind = "a saved data set, which is read in place" if saved else "a data set of rows"
        raise DataError(f"{place.origin}: {', '.join(unused)} does nothing with {kind}. Remove it.")


def _load(place: Place) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetsError

    name, files = _builder(place)
    try:
        if place.section.streaming:
            return read_stream(place, name, files)
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
    text = str(error.__cause__ or error).strip().rstrip(".")
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
