"""A cell of a table, a text file or a JSON file → a record's captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple, cast

from lora_kit.errors import did_you_mean
from lora_kit.recipe import SourceSection

TEXT_SUFFIXES = (".txt", ".caption")
JSON_SUFFIX = ".json"
_JSON_KEYS = ("caption", "captions", "tags")


class Texts(NamedTuple):
    """What a record's caption and captions will be."""

    caption: str
    """The first or only one."""
    captions: tuple[str, ...] = ()
    """All of them, where there is a list."""


Result = Texts | str
"""Captions, or why there are none."""


def texts_in(cell: object, empty: str, fallback: str | None = None) -> Result:
    """The captions in a cell: a text, or a list of texts. `empty` says where one was missed; `fallback` stands in."""
    if cell is None or (isinstance(cell, str) and not cell.strip()) or cell == []:
        return f"no caption ({empty})" if fallback is None else Texts(fallback)
    if isinstance(cell, str):
        return Texts(cell.strip())
    if not isinstance(cell, list):
        return f"its caption is {type(cell).__name__}, not text: {cell!r}"
    captions: list[str] = []
    for number, item in enumerate(cast(list[object], cell), start=1):
        if not isinstance(item, str) or not item.strip():
            return f"caption {number} of its list is not text: {item!r}"
        captions.append(item.strip())
    return Texts(captions[0], tuple(captions))


def as_needed(section: SourceSection, result: Result) -> Result:
    """The result; where captions are not read, a missing or broken one is as good as an empty one."""
    return result if section.reads_captions or isinstance(result, Texts) else Texts("")


def sidecar_suffixes(section: SourceSection) -> tuple[str, ...]:
    """What caption files beside pictures may end in; the first ones go before `.json`."""
    return (section.caption_suffix,) if section.caption_suffix else (*TEXT_SUFFIXES, JSON_SUFFIX)


def sidecar_texts(section: SourceSection, stem: str, present: Collection[str], read: Callable[[str], bytes]) -> Result:
    """The captions of the picture called `stem` less its ending, from the file of that name beside it.

    present: the names there are; read: the content of one of them, raises OSError.
    """
    found = [stem + suffix for suffix in sidecar_suffixes(section) if stem + suffix in present]
    texts = [name for name in found if not name.endswith(JSON_SUFFIX)]
    if len(texts) > 1:
        return f"two captions, {' and '.join(texts)}; keep one"
    if not found:
        fallback = section.caption_fallback
        return _missing(section, PurePosixPath(stem).name) if fallback is None else Texts(fallback)
    try:
        content = read(found[0]).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"{found[0]} is not UTF-8 text ({error.reason} at byte {error.start})"
    except OSError as error:
        return f"{found[0]} cannot be read ({error.strerror})"
    return texts_in(content, f"{found[0]} is empty") if texts else _json_texts(section, found[0], content)


def _missing(section: SourceSection, stem: str) -> str:
    if section.caption_suffix:
        return f"no caption (looked for {stem}{section.caption_suffix} beside it)"
    texts = " or ".join(stem + suffix for suffix in TEXT_SUFFIXES)
    return f"no caption (looked for {texts} beside it), nor {stem}{JSON_SUFFIX}"


def _json_texts(section: SourceSection, name: str, content: str) -> Result:
    try:
        value: Any = json.loads(content)
    except json.JSONDecodeError as error:
        return f"{name} is not JSON ({error.msg} at line {error.lineno}, column {error.colno})"
    if not isinstance(value, dict):
        return f"{name} is not a JSON object with a caption, but {type(value).__name__}"
    key, reason = _json_key(section.caption_column, value)
    if reason and section.caption_fallback is not None and not any(value.get(key) for key in _JSON_KEYS):
        return Texts(section.caption_fallback)
    if reason:
        return f"{name} {reason}"
    cell = value[key]
    if key == "tags" and isinstance(cell, list) and all(isinstance(tag, str) for tag in cast(list[object], cell)):
        cell = ", ".join(tag.strip() for tag in cast(list[str], cell) if tag.strip())
    return texts_in(cell, f"{key!r} in {name} is empty", section.caption_fallback)


def _json_key(column: str, value: Mapping[str, object]) -> tuple[str, str]:
    """The key with the caption, and why there is none: `column`, or of the usual ones the only one in use."""
    if column in value:
        return column, ""
    filled = [key for key in _JSON_KEYS if value.get(key)]
    if column != "text" or not filled:
        others = f", {', '.join(_JSON_KEYS)}" if column == "text" else ""
        return "", f"has no {column!r}{others}.{did_you_mean(column, value)}"
    if len(filled) > 1:
        return "", f"has {' and '.join(filled)}; say with caption_column which one is the caption"
    return filled[0], ""
