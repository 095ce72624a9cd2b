"""`where`: keep the rows whose columns hold given values."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence

from lora_kit.errors import DataError, did_you_mean


def require_column(name: str, columns: Collection[str], origin: str, field: str) -> None:
    """DataError unless `name` is one of the columns; `field` is the recipe's field that asks for it."""
    if name not in columns:
        raise DataError(
            f"{origin}: no column {name!r} ({field}). Its columns: {', '.join(sorted(columns)) or 'none'}."
            + did_you_mean(name, columns)
        )


def matching_rows(
    where: Mapping[str, Sequence[str]], count: int, column: Callable[[str], Sequence[object]], origin: str
) -> list[int]:
    """Indices of the rows that pass every condition. Numbers and booleans compare by their JSON text.

    Raises DataError if none does, naming the values that the column has.
    """
    kept = list(range(count))
    for name, allowed in where.items():
        values = column(name)
        texts = {row: as_text(values[row]) for row in kept}
        kept = [row for row, text in texts.items() if text in allowed]
        if not kept:
            found = sorted(set(texts.values()))
            shown = ", ".join(found[:8]) + (", …" if len(found) > 8 else "")
            hint = did_you_mean(allowed[0], found) if allowed else ""
            raise DataError(f"{origin}: where {name} = {list(allowed)} keeps nothing. It has: {shown}.{hint}")
    return kept


def as_text(value: object) -> str:
    """A cell as the recipe would write it: text itself, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
