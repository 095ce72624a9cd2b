"""The metadata `.json` of sd-scripts' tools: picture → caption and tags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_kit.data.sources.metadata import Row, Table
from lora_kit.data.sources.source import PICTURE_SUFFIXES, has_suffix
from lora_kit.errors import DataError


def read_kohya_metadata(path: Path, caption_column: str, folder: Path, files: Sequence[str]) -> Table:
    """The file as a table with the columns `file_name` and `caption_column`.

    Its keys are names, with or without their ending, or absolute paths. Tags follow the caption, or each of its
    lines, after a comma. Raises DataError if it cannot be read or is something else.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
        raise DataError(f"{path} is not what sd-scripts' tools write: an object of pictures, each with a caption.")
    names = _Names(folder, files)
    rows = [
        Row(f'{path.name} "{key}"', {"file_name": names.file(key), caption_column: _caption(item)})
        for key, item in value.items()
    ]
    return Table({"file_name", caption_column}, rows)


class _Names:
    """Finds the pictures that keys stand for."""

    def __init__(self, folder: Path, files: Sequence[str]):
        self.folder = folder
        self.whole = frozenset(files)
        self.by_stem = {name.rpartition(".")[0]: name for name in files if has_suffix(name, PICTURE_SUFFIXES)}

    def file(self, key: str) -> str:
        """The name relative to the folder; the key itself if it stands for nothing there."""
        path = Path(key)
        inner = path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else key
        return inner if inner in self.whole else self.by_stem.get(inner, inner)


def _caption(item: Mapping[str, Any]) -> object:
    caption, tags = item.get("caption"), item.get("tags")
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = ", ".join(tags)
    if not tags or not caption:
        return caption or tags
    if not isinstance(tags, str) or not isinstance(caption, str):
        return tags if isinstance(caption, str) else caption  # no text: the flaw will say so
    return "\n".join(f"{line}, {tags}" for line in caption.splitlines() if line.strip())
