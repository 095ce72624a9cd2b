"""Training pictures that are held out, by their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from lora_kit.data.records import Record, Records
from lora_kit.errors import DataError

_PARTS = 2**32


def part_held_out(records: Records, fraction: float) -> tuple[Records, Records]:
    """(trained on, held out): a record is held out if the hash of its id says so.

    Nothing but the id counts: neither order nor the other records. Regularisation pictures stay in training. Two files
    of the same picture under different names may fall on either side. Raises DataError if a side is empty.
    """
    held = [record for record in records if not record.is_regularisation and _share(record.id) < fraction]
    names = {record.id for record in held}
    kept = [record for record in records if record.id not in names]
    if not held or not kept:
        side = "held out" if not held else "left to train on"
        raise DataError(
            f"validation.held_out_fraction: {fraction:g} of {len(records)} pictures, by the hash of their names, "
            f"leaves none {side}. Choose another fraction, or name a folder with validation.held_out."
        )
    return Records(kept, records.skipped, records.notices), Records([_once(record) for record in held])


def some_of(records: Iterable[Record], count: int) -> tuple[int, ...]:
    """Indices of at most `count` records, chosen by the hash of their ids, in order; no regularisation pictures."""
    chosen = [(_share(record.id), index) for index, record in enumerate(records) if not record.is_regularisation]
    return tuple(sorted(index for _, index in sorted(chosen)[:count]))


def _once(record: Record) -> Record:
    return replace(record, repeats=1)


def _share(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / _PARTS
