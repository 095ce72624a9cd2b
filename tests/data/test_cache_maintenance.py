"""Verifying finds what is damaged; pruning takes what nobody needs, and only when told to."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from lora_kit.data.cache import CacheStore, plan_pruning, prune, verify_store
from lora_kit.progress import no_progress

SIZE = 4 * 10
"""Bytes of an entry."""


def key(number: int) -> bytes:
    return bytes([number]) * 32


@pytest.fixture
def store(tmp_path: Path) -> CacheStore:
    """Twelve entries in four shards of three."""
    with CacheStore(tmp_path, shard_bytes=3 * SIZE) as store:
        for number in range(12):
            store.put(key(number), {"x": torch.full((10,), float(number))})
    assert len(store.shards) == 4
    return store


def spoil(path: Path) -> None:
    """Change the last byte: that of the last entry."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def held(folder: Path) -> dict[int, float]:
    """Number → value of every entry that a store opened now gives."""
    store = CacheStore(folder)
    found = {number: store.get(key(number)) for number in range(12)}
    return {number: float(tensors["x"].unique()) for number, tensors in found.items() if tensors is not None}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_whole_cache_is_verified(store: CacheStore) -> None:
    assert verify_store(store, no_progress) == (12, 12 * SIZE, 4, [])


def test_verifying_finds_damage_and_sets_it_aside(store: CacheStore) -> None:
    spoil(store.shards[0])
    store.shards[1].write_bytes(store.shards[1].read_bytes()[:-1])
    found = verify_store(CacheStore(store.folder), no_progress)
    assert (found.entries, found.size, found.shards) == (8, 8 * SIZE, 3)
    assert len(found.damage) == 2
    assert len(list(store.damaged_folder.iterdir())) == 2
    # What was set aside is not found a second time.
    assert verify_store(CacheStore(store.folder), no_progress) == (8, 8 * SIZE, 3, [])


def test_planning_changes_nothing(store: CacheStore) -> None:
    before = files(store.folder)
    plan = plan_pruning(store, {key(0)})
    assert (plan.drop, plan.drop_size) == (11, 11 * SIZE)
    assert files(store.folder) == before


def test_pruning_keeps_what_is_wanted(store: CacheStore) -> None:
    wanted = {number: float(number) for number in (0, 1, 2, 4, 9, 11)}
    untouched = store.shards[0]
    before = untouched.stat()
    prune(store, plan_pruning(store, {key(number) for number in wanted}))
    assert held(store.folder) == wanted
    assert untouched.stat() == before  # all of its entries stay
    assert len(CacheStore(store.folder)) == len(wanted)


def test_pruning_everything_leaves_an_empty_cache(store: CacheStore) -> None:
    prune(store, plan_pruning(store, set()))
    assert files(store.folder) == {}
    with CacheStore(store.folder) as again:
        again.put(key(3), {"x": torch.full((10,), 3.0)})
    assert held(store.folder) == {3: 3.0}


def test_a_process_that_reads_meanwhile_finds_what_was_packed_anew(store: CacheStore) -> None:
    reader = CacheStore(store.folder)
    prune(store, plan_pruning(store, {key(4), key(9)}))
    found = reader.get(key(4))
    assert found is not None and float(found["x"][0]) == 4.0
    assert reader.get(key(5)) is None
    assert reader.notices == []


def test_copies_go(store: CacheStore) -> None:
    second = CacheStore(store.folder.parent / "second")
    for number in (0, 5):
        second.put(key(number), {"x": torch.full((10,), float(number))})
    second.flush()
    second.shards[0].rename(store.shard_folder / second.shards[0].name)
    both = CacheStore(store.folder)
    plan = plan_pruning(both, {key(number) for number in range(12)})
    assert (plan.drop, plan.drop_size) == (2, 2 * SIZE)
    prune(both, plan)
    assert held(store.folder) == {number: float(number) for number in range(12)}
    assert len(CacheStore(store.folder)) == 12


def test_damaged_and_unfinished_files_are_counted_and_go(store: CacheStore) -> None:
    spoil(store.shards[0])
    verify_store(store, no_progress)
    old, young = (store.shard_folder / f".{name}.safetensors.1.tmp" for name in "ab")
    for path, age in ((old, 7200), (young, 0)):
        path.write_bytes(b"12345")
        os.utime(path, (time.time() - age,) * 2)
    plan = plan_pruning(store, {key(number) for number in range(12)})
    assert len(plan.leftovers) == 2  # the note, and what a killed process left; not what one may be writing now
    assert plan.drop == 0
    prune(store, plan)
    assert not old.exists() and young.exists()
    assert list(store.damaged_folder.iterdir()) == []
    # The note is gone, and so is the shard that it was about: its other entries were packed anew.
    assert verify_store(CacheStore(store.folder), no_progress) == (11, 11 * SIZE, 4, [])
    assert len(held(store.folder)) == 11


def test_pruning_never_keeps_a_damaged_entry(store: CacheStore) -> None:
    spoil(store.shards[0])
    prune(store, plan_pruning(store, {key(number) for number in range(1, 12)}))
    assert verify_store(CacheStore(store.folder), no_progress).damage == []
    assert held(store.folder).keys() <= set(range(1, 12))
