"""Folders of pictures with captions: metadata.jsonl / metadata.csv, or a text file beside each picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image

from lora_kit.data.filters import matching_rows, require_column
from lora_kit.data.metadata import METADATA_NAMES, Row, read_rows
from lora_kit.data.records import Flaw, Record, name_some
from lora_kit.data.source import FOREIGN_SUFFIXES, PICTURE_SUFFIXES, Found, Place, has_suffix, inner_path
from lora_kit.errors import DataError

CAPTION_SUFFIXES = (".txt", ".caption")


def read_folder(place: Place, folder: Path, files: Sequence[str]) -> Found:
    """All captioned pictures of a folder; `files` is its `list_files`.

    With metadata.jsonl or metadata.csv in it, those say what belongs to the set; else every picture needs a
    `.txt` or `.caption` file of the same name. Raises DataError for what makes the whole source unusable;
    single records that cannot be used become flaws.
    """
    tables = [name for name in METADATA_NAMES if name in files]
    if len(tables) > 1:
        raise DataError(f"{place.origin}: both {' and '.join(tables)} are there. Keep one.")
    found = _read_table(place, folder, tables[0], files) if tables else _read_sidecars(place, folder, files)
    foreign = Counter(PurePosixPath(name).suffix.lower() for name in files if has_suffix(name, FOREIGN_SUFFIXES))
    if foreign:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(foreign.items()))
        found.notices.append(f"{place.origin}: files that Pillow does not read are left out: {kinds}.")
    return found


def _read_table(place: Place, folder: Path, table: str, files: Sequence[str]) -> Found:
    found = Found()
    rows = read_rows(folder / table, f"{place.label}/{table}", found.flaws)
    columns = {name for row in rows for name in row.cells}
    if rows:
        require_column("file_name", columns, place.origin, f"{table} must name the pictures in it")
        require_column(place.section.caption_column, columns, place.origin, "caption_column")
    for name in place.section.where:
        require_column(name, columns, place.origin, "where")
    kept = matching_rows(
        place.section.where, len(rows), lambda name: [row.cells.get(name) for row in rows], place.origin
    )
    present = frozenset(files)
    for row in (rows[index] for index in kept):
        result = _table_record(place, folder, row, present)
        found.add(result)
    _notice_unnamed(place, table, rows, files, found)
    return found


def _table_record(place: Place, folder: Path, row: Row, present: Collection[str]) -> Record | Flaw:
    name = row.cells.get("file_name")
    if not isinstance(name, str) or not name.strip():
        return Flaw(row.id, "the row has no file_name")
    inner = inner_path(name)
    if inner is None:
        return Flaw(row.id, f"file_name {name!r} leaves the data folder {folder}; only pictures in it are read")
    record_id = f"{place.label}/{inner}"
    if inner not in present and not (folder / inner).is_file():
        return Flaw(record_id, f"the file is missing, and {row.id} names it (looked for {folder / inner})")
    caption = row.cells.get(place.section.caption_column)
    reason = caption_flaw(caption, f"{row.id} has no {place.section.caption_column!r}")
    if reason:
        return Flaw(record_id, reason)
    return _record(place, folder, inner, str(caption))


def _notice_unnamed(place: Place, table: str, rows: Sequence[Row], files: Sequence[str], found: Found) -> None:
    named = {inner_path(name) for row in rows if isinstance(name := row.cells.get("file_name"), str)}
    unnamed = [name for name in files if has_suffix(name, PICTURE_SUFFIXES) and name not in named]
    if unnamed:
        found.notices.append(
            f"{place.origin}: pictures that {table} does not name are left out: {len(unnamed)} ({name_some(unnamed)})."
        )


def _read_sidecars(place: Place, folder: Path, files: Sequence[str]) -> Found:
    _refuse_nested_tables(place, files)
    if place.section.where:
        raise DataError(f"{place.origin}: where needs columns, and there is no {' or '.join(METADATA_NAMES)} in it.")
    found = Found()
    present = frozenset(files)
    stems = {name.rpartition(".")[0] for name in files if has_suffix(name, PICTURE_SUFFIXES)}
    for name in (name for name in files if has_suffix(name, PICTURE_SUFFIXES)):
        result = _sidecar_record(place, folder, name, present)
        found.add(result)
    lone = [name for name in files if name.endswith(CAPTION_SUFFIXES) and name.rpartition(".")[0] not in stems]
    if lone:
        found.notices.append(f"{place.origin}: text files without a picture: {len(lone)} ({name_some(lone)}).")
    return found


def _refuse_nested_tables(place: Place, files: Sequence[str]) -> None:
    folders = [str(PurePosixPath(name).parent) for name in files if PurePosixPath(name).name in METADATA_NAMES]
    if folders:
        raise DataError(
            f"{place.origin}: metadata lies in folders within it, {name_some(folders)}, not in itself. "
            "Make each of those a source of its own."
        )


def _sidecar_record(place: Place, folder: Path, name: str, present: Collection[str]) -> Record | Flaw:
    record_id, stem = f"{place.label}/{name}", name.rpartition(".")[0]
    sidecars = [stem + suffix for suffix in CAPTION_SUFFIXES if stem + suffix in present]
    if not sidecars:
        wanted = " or ".join(PurePosixPath(stem).name + suffix for suffix in CAPTION_SUFFIXES)
        return Flaw(record_id, f"no caption (looked for {wanted} beside it)")
    if len(sidecars) > 1:
        return Flaw(record_id, f"two captions, {' and '.join(sidecars)}; keep one")
    try:
        caption = (folder / sidecars[0]).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return Flaw(record_id, f"{sidecars[0]} is not UTF-8 text ({error.reason} at byte {error.start})")
    except OSError as error:
        return Flaw(record_id, f"{sidecars[0]} cannot be read ({error.strerror})")
    reason = caption_flaw(caption, f"{sidecars[0]} is empty")
    return Flaw(record_id, reason) if reason else _record(place, folder, name, caption)


def caption_flaw(caption: object, empty: str) -> str:
    """Why this cell is no caption, `empty` if there is nothing in it; nothing if it is one."""
    if caption is None or (isinstance(caption, str) and not caption.strip()):
        return f"no caption ({empty})"
    return "" if isinstance(caption, str) else f"its caption is {type(caption).__name__}, not text: {caption!r}"


def _record(place: Place, folder: Path, inner: str, caption: str) -> Record:
    opener = partial(Image.open, folder / inner)
    return Record(f"{place.label}/{inner}", caption.strip(), place.index, place.section.repeats, opener)
