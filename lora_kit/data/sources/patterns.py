"""Names of many files at once: `shards/{000..019}.tar`, `{train,extra}-*.tar`."""

from __future__ import annotations

import re
from pathlib import Path

from lora_kit.errors import DataError, did_you_mean

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_FILES = 1_000_000


def matching_files(pattern: Path, origin: str) -> list[Path]:
    """The files that a path names: itself, or what its braces and wildcards stand for, sorted within each wildcard.

    A range counts with the zeros of its first number. Raises DataError that names the missing ones, or if there are
    none at all.
    """
    names = expand_braces(str(pattern), origin)
    found: list[Path] = []
    for name in names:
        found += _matches(Path(name)) if any(letter in name for letter in "*?") else [Path(name)]
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        first = missing[0] if missing else pattern
        near = [entry.name for entry in first.parent.iterdir()] if first.parent.is_dir() else []
        counted = f"{len(missing)} of {len(found)} files are missing, the first is {first}" if missing else "no file"
        raise DataError(f"{origin}: {counted}.{did_you_mean(first.name, near)}")
    return list(dict.fromkeys(found))


def _matches(path: Path) -> list[Path]:
    inner = path.relative_to(path.anchor).as_posix()
    # Only * and ? are wildcards here: brackets are more often part of a folder's name.
    return sorted(Path(path.anchor).glob(inner.replace("[", "[[]")))


def expand_braces(text: str, origin: str) -> list[str]:
    """`a{0..2}` and `a{0,1,2}` as a0, a1, a2; several and nested braces in all combinations."""
    match = _BRACES.search(text)
    if match is None:
        return [text]
    head, tail = text[: match.start()], text[match.end() :]
    whole = [head + part + tail for part in _parts(match[1], origin)]
    return [name for part in whole for name in expand_braces(part, origin)]


def _parts(inside: str, origin: str) -> list[str]:
    bounds = _RANGE.fullmatch(inside)
    if bounds is None:
        return inside.split(",")
    first, last = int(bounds[1]), int(bounds[2])
    if last < first or last - first >= _MOST_FILES:
        raise DataError(f"{origin}: {{{inside}}} is no range; write the smaller number first.")
    return [str(number).zfill(len(bounds[1])) for number in range(first, last + 1)]
