"""What is known of picture files without reading them: identity → SHA-256, size, animated.

    FOLDER/hints/…      a few safetensors files, each whole and named by its content; any of them may be deleted

A hint spares reading a hundred thousand pictures at every start. It can be wrong only where a file changed and kept
its size, modification time and inode.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from lora_kit.data.cache.table import KeyTable, Rows, new_rows, row_type
from lora_kit.data.cache.views import Facts
from lora_kit.errors import DataError
from lora_kit.files import write_atomically

_NAME = re.compile(r"[0-9a-f]{40}\.safetensors")
_KEY_BYTES = 16
_ROW = row_type(_KEY_BYTES, ("sha256", "V32"), ("size", "<i4", (2,)), ("animated", "?"))
_MANY_FILES = 16


class PictureHints:
    """The hints of a cache folder."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`/hints; it need not exist yet. Memory and reading time: 57 bytes a picture."""
        self.folder = folder / "hints"
        self._files: set[str] = set()
        self._table = KeyTable(_ROW)
        self._new: dict[bytes, Facts] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._table) + len(self._new)

    def find(self, identity: str) -> Facts | None:
        """The facts of a picture, or None if there is no hint, or there are two that disagree."""
        key = _key(identity)
        if key in self._new:
            return self._new[key]
        found = {_facts(self._table.rows[row]) for row in self._table.find(key)}
        return found.pop() if len(found) == 1 else None

    def add(self, identity: str, facts: Facts) -> None:
        """Note a picture's facts; `flush` writes them."""
        if self.find(identity) != facts:
            self._new[_key(identity)] = facts

    def flush(self) -> None:
        """Write what was added as a file of its own; packs many small files into one."""
        if self._new:
            keys, facts = list(self._new), list(self._new.values())
            rows = new_rows(_ROW, keys)
            rows["sha256"] = np.frombuffer(b"".join(fact.sha256 for fact in facts), _ROW["sha256"])
            rows["size"] = [(fact.width, fact.height) for fact in facts]
            rows["animated"] = [fact.animated for fact in facts]
            self._files.add(self._write(rows))
            self._table.add([rows])
            self._new = {}
        if len(self._files) > _MANY_FILES:
            self._replace(self._table.rows)

    def forget(self, identities: Collection[str]) -> None:
        """Drop what is known of these pictures."""
        keys = {_key(identity) for identity in identities}
        self._new = {key: facts for key, facts in self._new.items() if key not in keys}
        self.flush()
        rows = {row for key in keys for row in self._table.find(key)}
        if rows:
            self._table.keep(np.array([index not in rows for index in range(len(self._table))]))
            self._replace(self._table.rows)

    def refresh(self) -> None:
        """Read files that were written since. A damaged one is left out: it only spared work."""
        parts: list[Rows] = []
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._files or not _NAME.fullmatch(path.name):
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # packed by another process
                continue
            if _name(content) == path.name:
                self._files.add(path.name)
                parts.append(np.frombuffer(load(content)["rows"].numpy().tobytes(), _ROW))
        self._table.add(parts)

    def _replace(self, rows: Rows) -> None:
        """One file in the place of all that this process has read; what others wrote meanwhile stays."""
        unique = rows[np.unique(np.frombuffer(rows.tobytes(), f"V{_ROW.itemsize}"), return_index=True)[1]]
        old = self._files
        kept = {self._write(unique)} if len(unique) else set[str]()
        for name in old - kept:
            (self.folder / name).unlink(missing_ok=True)
        self._files = kept

    def _write(self, rows: Rows) -> str:
        raw = torch.from_numpy(np.frombuffer(rows.tobytes(), np.uint8).reshape(len(rows), -1).copy())
        content = save({"rows": raw})
        path = self.folder / _name(content)
        try:
            write_atomically(path, lambda temporary: temporary.write_bytes(content))
        except OSError as error:
            raise DataError(f"The cache {self.folder} cannot be written: {error.strerror or error}.") from error
        return path.name


def _key(identity: str) -> bytes:
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()[:_KEY_BYTES]


def _facts(row: Any) -> Facts:
    width, height = row["size"].tolist()
    return Facts(row["sha256"].tobytes(), width, height, bool(row["animated"]))


def _name(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()[:40]}.safetensors"
