"""The store gives back what was put, bit for bit, or says that it is missing: never other numbers."""

from __future__ import annotations

import pickle
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_kit.data.cache import CacheStore
from lora_kit.data.cache.shard import DamagedError, read_entry, read_shard, write_shard
from lora_kit.errors import DataError


def key(number: int) -> bytes:
    return random.Random(number).randbytes(32)


def entry(number: int) -> dict[str, Tensor]:
    """Tensors of three dtypes and of several shapes, by number, one of which has not-a-numbers."""
    generator = torch.Generator().manual_seed(number)
    dtype = (torch.float32, torch.float16, torch.bfloat16)[number % 3]
    mean = torch.randn(2, 1 + number % 4, 3, generator=generator).to(dtype)
    mean[0, 0, 0] = float("nan") if number % 5 == 0 else 1.0
    return {"mean": mean, "std": mean.abs()}


def same(found: dict[str, Tensor] | None, number: int) -> bool:
    """Equal bit for bit, in names, dtypes and shapes too."""
    wanted = entry(number)
    return (
        found is not None
        and found.keys() == wanted.keys()
        and all(
            found[name].dtype == tensor.dtype
            and found[name].shape == tensor.shape
            and torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
            for name, tensor in wanted.items()
        )
    )


def fill(folder: Path, numbers: range, shard_bytes: int = 1 << 20) -> CacheStore:
    with CacheStore(folder, shard_bytes) as store:
        for number in numbers:
            store.put(key(number), entry(number))
    return store


def flip(path: Path, place: int, mask: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


def test_entries_come_back_bit_for_bit(tmp_path: Path) -> None:
    written = fill(tmp_path, range(30), shard_bytes=500)
    opened = CacheStore(tmp_path)
    assert len(opened.shards) > 3
    for store in (written, opened):
        assert len(store) == 30
        assert all(key(number) in store and same(store.get(key(number)), number) for number in range(30))
        assert key(30) not in store
        assert store.get(key(30)) is None


def test_what_waits_to_be_written_can_be_read(tmp_path: Path) -> None:
    store = CacheStore(tmp_path)
    store.put(key(1), entry(1))
    assert key(1) in store
    assert same(store.get(key(1)), 1)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_was_put_does_not_follow_the_callers_tensor(tmp_path: Path) -> None:
    tensors = entry(1)
    with CacheStore(tmp_path) as store:
        store.put(key(1), tensors)
        tensors["mean"].zero_()
    assert same(store.get(key(1)), 1)


def test_rows_of_a_batch_and_other_memory_layouts_are_stored_as_they_look(tmp_path: Path) -> None:
    batch = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    with CacheStore(tmp_path) as store:
        for row in range(3):
            store.put(key(row), {"mean": batch[row], "std": batch[row].transpose(0, 2)})
    for row in range(3):
        found = CacheStore(tmp_path).get(key(row))
        assert found is not None
        assert torch.equal(found["mean"], batch[row])
        assert torch.equal(found["std"], batch[row].transpose(0, 2))


def test_shards_are_of_bounded_size(tmp_path: Path) -> None:
    with CacheStore(tmp_path, shard_bytes=4000) as store:
        for number in range(40):
            store.put(key(number), {"mean": torch.full((100,), float(number))})
    sizes = [sum(each.size for each in read_shard(path)) for path in store.shards]
    assert sizes == [4000] * 4


def test_a_shard_is_written_in_time_however_small(tmp_path: Path) -> None:
    store = CacheStore(tmp_path, shard_seconds=0.0)
    assert store.put(key(1), entry(1))
    assert same(CacheStore(tmp_path).get(key(1)), 1)


def test_work_is_kept_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CacheStore(tmp_path) as store:
        store.put(key(1), entry(1))
        raise KeyboardInterrupt
    assert same(CacheStore(tmp_path).get(key(1)), 1)


def test_a_reader_sees_what_another_wrote_once_it_looks(tmp_path: Path) -> None:
    reader = CacheStore(tmp_path)
    fill(tmp_path, range(3))
    assert key(1) not in reader
    assert reader.refresh()
    assert same(reader.get(key(1)), 1)
    assert not reader.refresh()


def test_two_writers_of_the_same_entry_do_no_harm(tmp_path: Path) -> None:
    first, second = CacheStore(tmp_path), CacheStore(tmp_path)
    for store in (first, second):
        store.put(key(1), entry(1))
    first.flush()
    second.flush()
    assert len(CacheStore(tmp_path).shards) == 2
    assert same(CacheStore(tmp_path).get(key(1)), 1)


def test_the_copy_of_a_damaged_entry_is_found(tmp_path: Path) -> None:
    first, second = CacheStore(tmp_path), CacheStore(tmp_path)
    for store in (first, second):
        store.put(key(1), entry(1))
        store.flush()
    flip(first.shards[0], -1, 1)
    reader = CacheStore(tmp_path)
    assert same(reader.get(key(1)), 1)


def test_a_store_can_be_handed_to_another_process(tmp_path: Path) -> None:
    store: CacheStore = pickle.loads(pickle.dumps(fill(tmp_path, range(5))))
    assert same(store.get(key(3)), 3)


def test_a_shard_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = fill(tmp_path, range(3)).shards[0]
    held = load_file(path)
    assert torch.equal(held[f"{key(1).hex()}.std"], entry(1)["std"])
    assert len(held) == 6


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of seven entries."""
    path = fill(tmp_path_factory.mktemp("one"), range(7)).shards[0]
    assert len(read_shard(path)) == 7
    return path


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_any_flipped_byte_costs_exactly_the_entries_it_lies_in(shard: Path, data: st.DataObject) -> None:
    content = shard.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    mask = data.draw(st.integers(1, 255))
    entries = read_shard(shard)
    hit = {each.key for each in entries if each.begin <= place < each.begin + each.size}
    if not hit:  # in the header, without which no entry can be trusted
        hit = {each.key for each in entries}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        damaged = folder / "shards" / shard.name
        damaged.write_bytes(content)
        flip(damaged, place, mask)
        store = CacheStore(folder)
        for number in range(7):
            found = store.get(key(number))
            assert found is None if key(number) in hit else same(found, number)
        assert len(store.notices) == 1
        kept = [path.read_bytes() for path in folder.rglob("*.safetensors")]
        assert kept == [content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]]


def test_a_damaged_entry_is_noted_made_anew_and_stays_whole(tmp_path: Path) -> None:
    path = fill(tmp_path, range(1)).shards[0]
    flip(path, -1, 1)
    assert CacheStore(tmp_path).get(key(0)) is None
    # Noted on disk: whoever opens the cache later does not count on it.
    later = CacheStore(tmp_path)
    assert key(0) not in later
    with later:
        later.put(key(0), entry(0))
    assert same(CacheStore(tmp_path).get(key(0)), 0)
    assert path.exists()


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_torn_shard_is_set_aside_whole(tmp_path: Path, length: int) -> None:
    path = fill(tmp_path, range(5)).shards[0]
    torn = path.read_bytes()[:length]
    path.write_bytes(torn)
    store = CacheStore(tmp_path)
    assert len(store) == 0
    assert (store.damaged_folder / path.name).read_bytes() == torn
    assert not path.exists()
    assert str(store.damaged_folder) in store.notices[0]
    fill(tmp_path, range(5))
    assert same(CacheStore(tmp_path).get(key(4)), 4)


def test_a_shard_torn_after_it_was_opened_is_no_crash(tmp_path: Path) -> None:
    path = fill(tmp_path, range(5)).shards[0]
    store = CacheStore(tmp_path)
    last = max(read_shard(path), key=lambda each: each.begin)
    path.write_bytes(path.read_bytes()[:-1])
    assert store.get(last.key) is None
    with pytest.raises(DamagedError, match="is cut off"):
        read_entry(path, last)


def test_a_shard_that_another_process_packed_anew_is_found_again(tmp_path: Path) -> None:
    store = fill(tmp_path, range(3))
    old = store.shards[0]
    write_shard(tmp_path / "shards", {key(1): entry(1)})
    old.unlink()
    assert same(store.get(key(1)), 1)
    assert store.get(key(2)) is None
    assert store.notices == []


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    others = [tmp_path / "shards" / "mine.safetensors", tmp_path / "shards" / f".{'0' * 40}.safetensors.12.tmp"]
    for other in others:
        other.write_bytes(b"mine")
    assert len(CacheStore(tmp_path)) == 2
    assert all(other.read_bytes() == b"mine" for other in others)


def test_a_cache_that_cannot_be_written_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "shards").write_bytes(b"a file where the folder should be")
    store = CacheStore(tmp_path)
    store.put(key(1), entry(1))
    with pytest.raises(DataError, match=r"cannot be written: .*\. Make room, or name another folder as data.cache_dir"):
        store.flush()
