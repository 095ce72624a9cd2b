"""A sorted table in memory, looked up by keys that are hashes: about 80 bytes a row, however many rows there are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]


def row_type(key_bytes: int, *columns: tuple[Any, ...]) -> np.dtype[Any]:
    """The dtype of a table's rows: `key`, and `columns` as NumPy writes them."""
    return np.dtype([("key", f"V{key_bytes}"), *columns])


def new_rows(dtype: np.dtype[Any], keys: list[bytes]) -> Rows:
    """Rows with these keys, everything else zero."""
    rows = np.zeros(len(keys), dtype)
    rows["key"] = np.frombuffer(b"".join(keys), dtype["key"])
    return rows


class KeyTable:
    """Rows sorted by key. The same key may stand in several."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.rows: Rows = np.zeros(0, dtype)
        self._heads = np.zeros(0, np.uint64)
        """The keys' first eight bytes as numbers."""

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, parts: list[Rows]) -> None:
        """Sort new rows in. Costs a sort of the whole table: 20 ms for 100 k rows."""
        if not any(len(part) for part in parts):
            return
        rows = np.concatenate([self.rows, *parts])
        heads = _heads(rows)
        order = np.argsort(heads, kind="stable")
        self.rows, self._heads = rows[order], heads[order]

    def find(self, key: bytes) -> list[int]:
        """Indices of the rows with this key, in the order they were added."""
        head = int.from_bytes(key[:8], "big")
        index = int(np.searchsorted(self._heads, np.uint64(head)))
        found: list[int] = []
        while index < len(self.rows) and int(self._heads[index]) == head:
            if self.rows["key"][index].tobytes() == key:
                found.append(index)
            index += 1
        return found

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Leave out the rows where `mask` is False."""
        self.rows, self._heads = self.rows[mask], self._heads[mask]


def _heads(rows: Rows) -> NDArray[np.uint64]:
    raw = np.frombuffer(rows["key"].tobytes(), np.uint8).reshape(len(rows), -1)
    return raw[:, :8].copy().view(">u8")[:, 0].astype(np.uint64)
