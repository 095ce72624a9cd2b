"""Reading the whole cache to find damage, and dropping what is not needed."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lora_kit.data.cache.hints import PictureHints
from lora_kit.data.cache.origin import digest, identity, read_bytes
from lora_kit.data.cache.shard import write_shard
from lora_kit.data.cache.store import SHARD_BYTES, CacheStore
from lora_kit.data.records import Record
from lora_kit.errors import DataError
from lora_kit.files import sync_folder
from lora_kit.progress import ProgressBar

_ABANDONED_S = 3600.0
"""An unfinished file of this age has no writer any more: writing one takes seconds."""


class Verified(NamedTuple):
    """What reading the whole cache found."""

    entries: int
    """That are whole."""
    size: int
    """Their bytes."""
    shards: int
    damage: list[str]
    """What was set aside now, a line each."""


class Pruning(NamedTuple):
    """What would go."""

    keep: dict[Path, list[int]]
    """Shards of which something goes, with the rows that stay."""
    drop: int
    """Entries that go: not needed, or copies of others."""
    drop_size: int
    """Their bytes."""
    leftovers: list[Path]
    """Files that were set aside as damaged, and unfinished ones of processes that were killed."""
    leftovers_size: int


def verify_store(store: CacheStore, bar: ProgressBar) -> Verified:
    """Read every entry and compare its checksum; what is damaged is set aside, and made anew when it is needed."""
    rows = store.rows()
    entries = size = 0
    with closing(bar(rows, "Verifying the cache", len(rows))) as stream:
        for row in stream:
            if store.read(row) is not None:
                entries += 1
                size += store.entry(row)[1].size
    return Verified(entries, size, len(store.shards), list(store.notices))


def verify_hints(hints: PictureHints, records: Sequence[Record], bar: ProgressBar) -> list[str]:
    """Read every picture that there is a hint for; forget those that are wrong, and return their records' ids.

    A picture that cannot be read is left to the next run, which names it.
    """
    wrong: dict[str, str] = {}
    with closing(bar(records, "Verifying pictures", len(records))) as stream:
        for record in stream:
            name = identity(record)
            facts = hints.find(name) if name is not None else None
            if name is not None and facts is not None and _hash(record) not in (None, facts.sha256):
                wrong[name] = record.id
    hints.forget(wrong)
    return list(wrong.values())


def plan_pruning(store: CacheStore, wanted: Collection[bytes]) -> Pruning:
    """What of the cache is not in `wanted`, and what lies in its folder besides. Changes nothing."""
    by_shard: dict[Path, list[int]] = {path: [] for path in store.shards}
    # Shards with a damaged entry go too: the note on it does, and what is whole in them is packed anew.
    kept, gone = set[bytes](), set(store.impaired)
    drop = drop_size = 0
    for row in store.rows():
        path, entry = store.entry(row)
        if entry.key in wanted and entry.key not in kept:
            kept.add(entry.key)
            by_shard[path].append(row)
            continue
        gone.add(path)
        drop += 1
        drop_size += entry.size
    leftovers = _leftovers(store)
    leftovers_size = sum(path.stat().st_size for path in leftovers)
    return Pruning({path: by_shard[path] for path in sorted(gone)}, drop, drop_size, leftovers, leftovers_size)


def prune(store: CacheStore, plan: Pruning) -> None:
    """Do what `plan_pruning` of this store said: what stays is packed into new shards before old ones are removed.

    A process that trains from the cache meanwhile finds entries in their new place. Raises DataError if the disk
    refuses; nothing is lost then.
    """
    waiting: dict[bytes, dict[str, Tensor]] = {}
    size = 0
    try:
        for row in (row for rows in plan.keep.values() for row in rows):
            tensors, entry = store.read(row), store.entry(row)[1]
            if tensors is None:
                continue  # damaged, and noted by now
            waiting[entry.key] = {name: tensor.clone() for name, tensor in tensors.items()}
            size += entry.size
            if size >= SHARD_BYTES:
                write_shard(store.shard_folder, waiting)
                waiting, size = {}, 0
        if waiting:
            write_shard(store.shard_folder, waiting)
        for path in (*plan.keep, *plan.leftovers):
            path.unlink(missing_ok=True)
        if store.shard_folder.is_dir():
            sync_folder(store.shard_folder)
    except OSError as error:
        raise DataError(f"The cache {store.folder} cannot be pruned: {error.strerror or error}.") from error


def _leftovers(store: CacheStore) -> list[Path]:
    oldest = time.time() - _ABANDONED_S
    unfinished = [
        path
        for folder in (store.shard_folder, store.folder / "hints", store.damaged_folder)
        for path in folder.glob(".*.tmp")
        if path.stat().st_mtime < oldest
    ]
    return sorted([*store.damaged_folder.glob("*.safetensors"), *store.damaged_folder.glob("*.txt"), *unfinished])


def _hash(record: Record) -> bytes | None:
    try:
        return digest(*read_bytes(record))
    except DataError:
        return None
