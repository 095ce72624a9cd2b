"""Which mask belongs to which picture: beside it by its name, in a folder of masks, or named in a column."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_kit.data.records import Record, name_some
from lora_kit.data.sources.source import PICTURE_SUFFIXES, Found, Links, Place, has_suffix, list_files, picture_opener
from lora_kit.errors import DataError


def part_masks(names: Iterable[str], suffix: str | None) -> tuple[list[str], dict[str, str]]:
    """(names that are no masks, picture's name without its ending → its mask), by what masks' names end in.

    `a/1-mask.png` is the mask of `a/1.jpg`, with the suffix `-mask`. Without a suffix there are no masks.
    """
    others: list[str] = []
    masks: dict[str, str] = {}
    for name in names:
        stem = stem_of(name)
        if suffix and has_suffix(name, PICTURE_SUFFIXES) and stem.endswith(suffix):
            masks[stem.removesuffix(suffix)] = name
        else:
            others.append(name)
    return others, masks


def stem_of(name: str) -> str:
    """`a/1.jpg` → `a/1`."""
    return os.path.splitext(name)[0]  # noqa: PTH122 (as has_suffix)


def add_masks(place: Place, found: Found, beside: Mapping[str, str], folder: Path) -> Found:
    """Give a folder's records the masks that lie beside them (`part_masks`), or in the source's `mask_folder`.

    Raises DataError if no picture has one, or a picture two; the others are told.
    """
    section = place.section
    if section.mask_folder is not None:
        folder = Path(section.mask_folder)
        beside = _listed(place, folder)
    elif section.mask_suffix is None:
        return found
    links = Links(folder)
    used: set[str] = set()
    records: list[Record] = []
    for record in found.records:
        stem = stem_of(record.id.removeprefix(f"{place.label}/"))
        name = beside.get(stem)
        if name is None or links.leave(name):
            records.append(record)
            continue
        used.add(stem)
        records.append(replace(record, mask=picture_opener(folder, name)))
    found.records = records
    tell_masks(place, found, [name for stem, name in beside.items() if stem not in used])
    return found


def tell_masks(place: Place, found: Found, unused: Sequence[str]) -> None:
    """Notices about pictures without a mask and masks without a picture. Raises DataError if no picture has one."""
    without = [record.id for record in found.records if record.mask is None]
    if found.records and len(without) == len(found.records):
        section = place.section
        looked = (
            f"mask_folder {section.mask_folder}"
            if section.mask_folder
            else f"mask_column {section.mask_column!r}"
            if section.mask_column
            else f"mask_suffix {section.mask_suffix!r}"
        )
        raise DataError(f"{place.origin}: no picture has a mask, looked for by {looked}. Mend it, or take it out.")
    if without:
        total = len(found.records)
        found.notices.append(
            f"{place.origin}: pictures without a mask, which count everywhere: {len(without)} of {total} "
            f"({name_some(without)})."
        )
    if unused:
        found.notices.append(
            f"{place.origin}: masks of no picture are left out: {len(unused)} ({name_some(list(unused))})."
        )


def _listed(place: Place, folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        raise DataError(f"{place.origin}: mask_folder: there is no folder {folder}.")
    masks: dict[str, str] = {}
    for name in list_files(folder):
        if not has_suffix(name, PICTURE_SUFFIXES):
            continue
        other = masks.setdefault(stem_of(name), name)
        if other != name:
            raise DataError(f"{place.origin}: mask_folder {folder} has two masks of one name, {other} and {name}.")
    return masks
