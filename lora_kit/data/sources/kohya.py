"""sd-scripts' folders `N_name`: N repeats of each picture, `name` for pictures without a caption."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lora_kit.data.records import name_some
from lora_kit.data.sources.sidecars import read_sidecars
from lora_kit.data.sources.source import PICTURE_SUFFIXES, Found, Place, has_suffix
from lora_kit.errors import DataError

_NAMED = re.compile(r"(?:(img|reg)/)?([1-9]\d*)_([^/]+)/")
# `2024_summer` in a folder that nobody called kohya's is a year. Repeats of a thousand would be a mistake anyway.
_MOST_REPEATS = 999


class Group(NamedTuple):
    """One `N_name` folder."""

    folder: str
    """`10_cat`, or `img/10_cat` and `reg/1_cat` where a project keeps its two sets side by side."""
    repeats: int
    name: str
    regularisation: bool


def named_groups(place: Place, files: Sequence[str]) -> list[Group]:
    """The `N_name` folders with pictures in them; empty where the folder is to be read as a plain one.

    Raises DataError if `layout: kohya` was asked for and there are none.
    """
    layout = place.section.layout
    if layout == "plain":
        return []
    pictures = [name for name in files if has_suffix(name, PICTURE_SUFFIXES)]
    groups = {name: group for name in pictures if (group := _group(name))}
    if layout == "kohya" and not groups:
        inside = sorted({PurePosixPath(name).parts[0] for name in pictures})
        raise DataError(
            f"{place.origin}: layout: kohya, but no folder in it is named N_name, such as 10_cat, and has pictures. "
            f"It has: {name_some(inside, 8) or 'none'}. To set repeats of a whole folder, use `repeats`."
        )
    is_plain = len(groups) < len(pictures) or any(group.repeats > _MOST_REPEATS for group in groups.values())
    if layout == "auto" and is_plain:
        return []
    return sorted(set(groups.values()))


def read_groups(place: Place, folder: Path, files: Sequence[str], groups: Sequence[Group]) -> Found:
    """The pictures of these folders, with sidecars, and one notice that says how they were read."""
    found, counts = Found(kind="N_name folders"), list[str]()
    for group in groups:
        inner = [name for name in files if name.startswith(f"{group.folder}/")]
        part = read_sidecars(_place(place, group), folder, inner)
        found.records += part.records
        found.flaws += part.flaws
        found.notices += part.notices
        kind = " (regularisation)" if group.regularisation else ""
        counts.append(f"{group.folder} × {group.repeats}: {len(part.records)} pictures{kind}")
    found.notices.append(
        f"{place.origin}: read as N_name folders, N repeats each: {'; '.join(counts)}. "
        "`layout: plain` reads them without repeats."
    )
    _notice_others(place, files, groups, found)
    return found


def _group(picture: str) -> Group | None:
    match = _NAMED.match(picture)
    if match is None:
        return None
    side, repeats, name = match.groups()
    return Group(match[0].rstrip("/"), int(repeats), name, side == "reg")


def _place(place: Place, group: Group) -> Place:
    section = place.section
    changes = {
        "repeats": section.repeats * group.repeats,
        "regularisation": section.regularisation or group.regularisation,
        "caption_fallback": group.name if section.caption_fallback is None else section.caption_fallback,
    }
    return replace(place, section=section.model_copy(update=changes))


def _notice_others(place: Place, files: Sequence[str], groups: Sequence[Group], found: Found) -> None:
    roots = tuple(f"{group.folder}/" for group in groups)
    others = [name for name in files if has_suffix(name, PICTURE_SUFFIXES) and not name.startswith(roots)]
    if others:
        found.notices.append(
            f"{place.origin}: pictures outside of N_name folders are left out: {len(others)} ({name_some(others)})."
        )
