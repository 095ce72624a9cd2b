"""Pictures with a caption file of the same name beside each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from lora_kit.data.records import Flaw, Record, name_some
from lora_kit.data.sources.metadata import METADATA_NAMES
from lora_kit.data.sources.source import PICTURE_SUFFIXES, Found, Place, has_suffix, picture_opener
from lora_kit.data.sources.texts import JSON_SUFFIX, TEXT_SUFFIXES, as_needed, sidecar_suffixes, sidecar_texts
from lora_kit.errors import DataError


def read_sidecars(place: Place, folder: Path, files: Sequence[str]) -> Found:
    """The pictures among `files`, paths relative to `folder`, with the captions beside them."""
    _refuse_nested_tables(place, files)
    found = Found(kind="caption files")
    present = frozenset(files)
    pictures = [name for name in files if has_suffix(name, PICTURE_SUFFIXES)]
    for name in pictures:
        found.add(_record(place, folder, name, present))
    stems = {_stem(name) for name in pictures}
    lone = [name for name in files if _is_lone(name, sidecar_suffixes(place.section), stems)]
    if lone:
        found.notices.append(f"{place.origin}: text files without a picture: {len(lone)} ({name_some(lone)}).")
    if place.section.caption_suffix is None:
        _notice_unread_json(place, sorted(stems), present, found)
    return found


def _refuse_nested_tables(place: Place, files: Sequence[str]) -> None:
    folders = [str(PurePosixPath(name).parent) for name in files if PurePosixPath(name).name in METADATA_NAMES]
    if folders:
        raise DataError(
            f"{place.origin}: metadata lies in folders within it, {name_some(folders)}, not in itself. "
            "Make each of those a source of its own."
        )


def _record(place: Place, folder: Path, name: str, present: Collection[str]) -> Record | Flaw:
    found = sidecar_texts(place.section, _stem(name), present, partial(_read, str(folder)))
    texts = as_needed(place.section, found)
    if isinstance(texts, str):
        return Flaw(f"{place.label}/{name}", texts)
    return place.record(name, texts, picture_opener(folder, name))


def _read(folder: str, name: str) -> bytes:
    with open(f"{folder}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 (as picture_opener)
        return file.read()


def _is_lone(name: str, suffixes: Sequence[str], stems: Collection[str]) -> bool:
    ending = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
    return ending is not None and name.removesuffix(ending) not in stems


def _notice_unread_json(place: Place, stems: Sequence[str], present: Collection[str], found: Found) -> None:
    unread = [
        stem + JSON_SUFFIX
        for stem in stems
        if stem + JSON_SUFFIX in present and any(stem + suffix in present for suffix in TEXT_SUFFIXES)
    ]
    if unread:
        found.notices.append(
            f"{place.origin}: {len(unread)} pictures have a text file and a .json file; the text is the caption "
            f"({name_some(unread)}). caption_suffix picks the other."
        )


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
