"""Folders of pictures with captions: a metadata table, or a caption file beside each picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from lora_kit.data.records import Flaw, Record, name_some
from lora_kit.data.sources.filters import matching_rows, require_column
from lora_kit.data.sources.kohya import named_groups, read_groups
from lora_kit.data.sources.kohya_metadata import read_kohya_metadata
from lora_kit.data.sources.masks import tell_masks
from lora_kit.data.sources.metadata import METADATA_NAMES, Row, Table, read_table
from lora_kit.data.sources.sidecars import read_sidecars
from lora_kit.data.sources.source import (
    FOREIGN_SUFFIXES,
    PICTURE_SUFFIXES,
    Found,
    Links,
    Place,
    has_suffix,
    inner_path,
    picture_opener,
)
from lora_kit.data.sources.texts import as_needed, texts_in
from lora_kit.errors import DataError


def read_folder(place: Place, folder: Path, files: Sequence[str]) -> Found:
    """All captioned pictures of a folder; `files` is its `list_files`.

    With metadata.jsonl, .csv or .parquet in it, or a `metadata_file`, those say what belongs to the set; else every
    picture needs a caption file of the same name, or a folder named `N_name`. Raises DataError for what makes the
    whole source unusable; single records that cannot be used become flaws.
    """
    found = _read_any(place, folder, files)
    foreign = Counter(PurePosixPath(name).suffix.lower() for name in files if has_suffix(name, FOREIGN_SUFFIXES))
    if foreign:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(foreign.items()))
        found.notices.append(f"{place.origin}: files that Pillow does not read are left out: {kinds}.")
    return found


def _read_any(place: Place, folder: Path, files: Sequence[str]) -> Found:
    section = place.section
    tables = [name for name in METADATA_NAMES if name in files]
    if section.metadata_file is not None:
        return _read_table(place, folder, Path(section.metadata_file), files)
    if len(tables) > 1:
        raise DataError(f"{place.origin}: both {' and '.join(tables)} are there. Keep one.")
    if tables and section.layout == "kohya":
        raise DataError(f"{place.origin}: layout: kohya, but {tables[0]} says what is in the folder. Keep one of them.")
    if tables:
        return _read_table(place, folder, folder / tables[0], files)
    if section.where or section.mask_column is not None:
        name = "where" if section.where else "mask_column"
        raise DataError(f"{place.origin}: {name} needs columns, and there is no {' or '.join(METADATA_NAMES)} in it.")
    groups = named_groups(place, files)
    return read_groups(place, folder, files, groups) if groups else read_sidecars(place, folder, files)


def _read_table(place: Place, folder: Path, path: Path, files: Sequence[str]) -> Found:
    found, section = Found(kind=path.name), place.section
    if path.suffix.lower() == ".json":
        table = read_kohya_metadata(path, section.caption_column, folder, files)
    else:
        masks = () if section.mask_column is None else (section.mask_column,)
        wanted = ("file_name", section.caption_column, *masks, *section.where)
        name = path.name if section.metadata_file else f"{place.label}/{path.name}"
        table = read_table(path, name, wanted, found.flaws)
    kept = _kept_rows(place, path.name, table)
    present, links = frozenset(files), Links(folder)
    for row in (table.rows[index] for index in kept):
        found.add(_table_record(place, row, present, links))
    if section.mask_column is not None:
        tell_masks(place, found, ())
    _notice_unnamed(place, path.name, table.rows, files, found)
    return found


def _kept_rows(place: Place, name: str, table: Table) -> list[int]:
    where, columns = place.section.where, table.columns
    if table.rows:
        require_column("file_name", columns, place.origin, f"{name} must name the pictures in it")
        if place.section.reads_captions:
            require_column(place.section.caption_column, columns, place.origin, "caption_column")
    if table.rows and place.section.mask_column is not None:
        require_column(place.section.mask_column, columns, place.origin, "mask_column")
    for column in where:
        require_column(column, columns, place.origin, "where")
    return matching_rows(
        where, len(table.rows), lambda column: [row.cells.get(column) for row in table.rows], place.origin
    )


def _table_record(place: Place, row: Row, present: Collection[str], links: Links) -> Record | Flaw:
    name, folder = row.cells.get("file_name"), links.folder
    if not isinstance(name, str) or not name.strip():
        return Flaw(row.id, "the row has no file_name")
    inner = inner_path(name)
    if inner is None:
        return Flaw(row.id, f"file_name {name!r} leaves the data folder {folder}; only pictures in it are read")
    record_id = f"{place.label}/{inner}"
    if inner not in present and not (folder / inner).is_file():
        return Flaw(record_id, f"the file is missing, and {row.id} names it (looked for {folder / inner})")
    if links.leave(inner):
        return Flaw(record_id, f"a link leads out of the data folder {folder}; put the picture itself there")
    missed = f"{row.id} has no {place.section.caption_column!r}"
    found = texts_in(row.cells.get(place.section.caption_column), missed, place.section.caption_fallback)
    texts = as_needed(place.section, found)
    if isinstance(texts, str):
        return Flaw(record_id, texts)
    record = place.record(inner, texts, picture_opener(folder, inner))
    mask = row.cells.get(place.section.mask_column) if place.section.mask_column is not None else None
    if mask is None or mask == "":
        return record
    inner_mask = inner_path(mask) if isinstance(mask, str) else None
    if inner_mask is None or links.leave(inner_mask):
        return Flaw(record_id, f"its mask {mask!r} leaves the data folder {folder}; only masks in it are read")
    return replace(record, mask=picture_opener(folder, inner_mask))


def _notice_unnamed(place: Place, table: str, rows: Sequence[Row], files: Sequence[str], found: Found) -> None:
    columns = [column for column in ("file_name", place.section.mask_column) if column is not None]
    cells = (row.cells.get(column) for row in rows for column in columns)
    named = {inner_path(name) for name in cells if isinstance(name, str)}
    unnamed = [name for name in files if has_suffix(name, PICTURE_SUFFIXES) and name not in named]
    if unnamed:
        found.notices.append(
            f"{place.origin}: pictures that {table} does not name are left out: {len(unnamed)} ({name_some(unnamed)})."
        )
