"""`data.sources` → records: find each source, tell what kind it is, and read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lora_kit.data.folder import read_folder
from lora_kit.data.hub import TABLE_BUILDERS, is_saved, read_hub
from lora_kit.data.metadata import METADATA_NAMES
from lora_kit.data.records import Records, settle_flaws
from lora_kit.data.source import PICTURE_SUFFIXES, Found, Place, has_suffix, list_files
from lora_kit.errors import DataError, did_you_mean
from lora_kit.recipe import DataSection, SourceSection, describe_lookup


def open_records(section: DataSection, folder: Path | None = None) -> Records:
    """The records of all sources, in a stable order. Reads captions, opens no picture.

    folder: what relative paths are relative to; by default the current folder (`load_recipe` has made them
    absolute). Raises DataError: a source is missing, empty, or lacks a column; or captions or files are missing
    and `on_error` is `raise`.
    """
    found = [_read(place) for place in _places(section.sources, folder or Path.cwd())]
    records = [record for part in found for record in part.records]
    flaws = [flaw for part in found for flaw in part.flaws]
    settle_flaws(flaws, len(records), section.on_error)
    return Records(records, flaws, [notice for part in found for notice in part.notices])


def count_records(section: DataSection, folder: Path | None = None) -> int:
    """Samples in one epoch: usable records times their repeats. Arguments and errors as of `open_records`."""
    return sum(record.repeats for record in open_records(section, folder))


def _places(sources: Sequence[SourceSection], folder: Path) -> list[Place]:
    paths = [_locate(source, index, folder) for index, source in enumerate(sources)]
    names = [(path.name if path else source.path) for path, source in zip(paths, sources, strict=True)]
    shared = {name for name, count in Counter(names).items() if count > 1}
    labels = [f"{name}@{index}" if name in shared else name for index, name in enumerate(names)]
    return [Place(source, index, labels[index], paths[index]) for index, source in enumerate(sources)]


def _locate(source: SourceSection, index: int, folder: Path) -> Path | None:
    """The source's absolute path; None if it can only be a data set of the hub."""
    path = (folder / source.path).absolute()
    if path.exists():
        return path
    parts = Path(source.path).parts
    is_id = len(parts) <= 2 and not Path(source.path).is_absolute() and not source.path.startswith((".", "~"))
    # `data/cats` beside an existing folder `data` is a slip of the pen, not a user `data` of the hub.
    if is_id and not (len(parts) == 2 and path.parent.is_dir()):
        return None
    hint = did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
    lookup = describe_lookup(source.path, folder)
    raise DataError(f"data.sources.{index}.path: no file or folder {source.path!r}: {lookup}.{hint}")


def _read(place: Place) -> Found:
    if place.path is None:
        return read_hub(place)
    if not place.path.is_dir():
        if place.path.name in METADATA_NAMES:
            raise DataError(f"{place.origin}: name the folder that {place.path.name} lies in: {place.path.parent}.")
        return read_hub(place)
    files = list_files(place.path)
    if is_saved(files):
        return read_hub(place, saved=True)
    has_tables = any(has_suffix(name, frozenset(TABLE_BUILDERS)) for name in files)
    is_pictures = any(name in METADATA_NAMES or has_suffix(name, PICTURE_SUFFIXES) for name in files)
    if has_tables and not is_pictures:
        return _not_empty(read_hub(place), place)
    return _not_empty(read_folder(place, place.path, files), place)


def _not_empty(found: Found, place: Place) -> Found:
    if found.records or found.flaws:
        return found
    notices = "".join(f" {notice}" for notice in found.notices)
    kinds = ", ".join(sorted(PICTURE_SUFFIXES))
    raise DataError(f"{place.origin}: no captioned picture in it. Looked for {kinds}, and below its folders.{notices}")
