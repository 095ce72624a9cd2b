"""Filling: everything once, whatever stops it, however many do it at the same time."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_kit.data import Record
from lora_kit.data.cache import (
    CacheStore,
    DiskLatents,
    DiskTexts,
    FillShare,
    LatentJob,
    PictureHints,
    SectionViews,
    fill_latents,
    fill_texts,
    missing_pictures,
    survey,
    text_key,
    view_of,
)
from lora_kit.data.crops import cut_picture, pixels_of
from lora_kit.data.pictures import read_picture
from lora_kit.errors import ModelError
from lora_kit.progress import no_progress
from lora_kit.recipe import DataSection

SIDE = 8
COUNT = 24
ONE = 2 * 4 * 16 * 4
"""Bytes of one entry: mean and deviation, 4 × 4 × 4, fp32."""
SECTION = DataSection.model_validate({"sources": [{"path": "here"}], "resolution": SIDE, "flip": True})


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """A stand-in for the VAE that treats every pixel alone, so that batching cannot change a bit."""
    mean = torch.cat([pixels, pixels[:, :1] * 2], 1)[..., ::2, ::2]
    return mean, mean.square() + 0.1


def job(encode: Callable[[Tensor], tuple[Tensor, Tensor]] = encode, **fields: Any) -> LatentJob:
    whole = {"stored": "fp32", "micro_batch": 4, "workers": 0, "raises": True, **fields}
    return LatentJob(views=SectionViews(SECTION), encode=encode, vae="vae", **whole)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Pictures of several sizes, none alike, written long ago."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    found: list[Record] = []
    for index in range(COUNT):
        path = folder / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (SIDE + index % 3, SIDE + 2, 3), dtype=np.uint8)).save(path)
        os.utime(path, (1e9, 1e9))
        found.append(Record(path.name, "", 0, 1, partial(Image.open, path)))
    return found


def fill(folder: Path, records: list[Record], job: LatentJob, share: FillShare = FillShare(), entries: int = 7) -> int:  # noqa: B008
    """Fill a cache of small shards; how many views were encoded."""
    store = CacheStore(folder, shard_bytes=entries * ONE)
    return fill_latents(store, PictureHints(folder), records, job, share, no_progress).encoded


def check_all(folder: Path, records: list[Record]) -> None:
    """Every entry is what encoding the picture anew gives, and no picture is asked for."""
    store = CacheStore(folder)
    facts = survey(records, PictureHints(folder))
    keys = [job().keys(record, fact) if fact else None for record, fact in zip(records, facts, strict=True)]
    assert missing_pictures(store, keys) == []
    known = [fact for fact in facts if fact is not None]
    latents = DiskLatents(store, [job().keys(record, fact) for record, fact in zip(records, known, strict=True)])
    assert (len(latents), latents.versions) == (len(records), 2)
    for index, record in enumerate(records):
        pixels = pixels_of(cut_picture(read_picture(record).image, (SIDE, SIDE)))
        for mirrored in (False, True):
            mean, std = encode((pixels.flip(-1) if mirrored else pixels)[None])
            found = latents.read(index, mirrored)
            assert found is not None
            assert torch.equal(found.mean, mean[0]) and torch.equal(found.std, std[0])
    assert store.notices == []


@pytest.mark.parametrize("workers", [0, 2])
def test_each_view_is_encoded_once_and_never_again(tmp_path: Path, records: list[Record], workers: int) -> None:
    assert fill(tmp_path, records, job(workers=workers)) == 2 * COUNT
    check_all(tmp_path, records)
    assert fill(tmp_path, records, job()) == 0


def test_a_full_cache_opens_no_picture(tmp_path: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, records, job())

    def unwanted(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("lora_kit.data.cache.pictures.read_bytes", unwanted)
    assert fill(tmp_path, records, job(unwanted)) == 0  # pyright: ignore[reportArgumentType] (never called)


def test_micro_batches_are_of_one_size_and_few_pictures_wait(tmp_path: Path, records: list[Record]) -> None:
    shapes: list[torch.Size] = []

    def views(record: Record, facts: Any) -> list[Any]:
        side = 8 * (1 + int(record.id.removesuffix(".png")) % 12)
        return [view_of((facts.width, facts.height), (side, side))]

    def noting(pixels: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(pixels.shape)
        return encode(pixels)

    several = job(noting, micro_batch=2)._replace(views=views)
    assert fill(tmp_path, records, several) == COUNT
    assert all(len(shape) == 4 and shape[0] <= 2 for shape in shapes)
    assert {shape[-1] for shape in shapes} == {8 * (1 + number) for number in range(12)}


def test_the_same_picture_twice_is_encoded_once(tmp_path: Path, records: list[Record]) -> None:
    assert fill(tmp_path, [*records[:3], *records[:3]], job(micro_batch=16)) == 6


def test_half_precision_is_stored_as_asked(tmp_path: Path, records: list[Record]) -> None:
    half = job(stored="fp16")
    fill(tmp_path, records[:1], half)
    fact = survey(records[:1], PictureHints(tmp_path))[0]
    assert fact is not None
    found = DiskLatents(CacheStore(tmp_path), [half.keys(records[0], fact)]).read(0)
    mean, std = encode(pixels_of(cut_picture(read_picture(records[0]).image, (SIDE, SIDE)))[None])
    assert found is not None and found.mean.dtype == torch.float32
    assert torch.equal(found.mean, mean[0].half().float()) and torch.equal(found.std, std[0].half().float())
    assert fill(tmp_path, records[:1], job()) == 2  # fp32 is another entry


def test_broken_pictures_come_back_with_their_reason(tmp_path: Path, records: list[Record]) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    broken = Record("x.png", "", 0, 1, partial(Image.open, tmp_path / "x.png"))
    store = CacheStore(tmp_path / "cache")
    mixed = [records[0], broken, records[1]]
    filled = fill_latents(store, PictureHints(tmp_path), mixed, job(raises=False), FillShare(), no_progress)
    assert list(filled.broken) == [1]
    assert filled.broken[1].startswith("not a readable picture")
    assert (filled.encoded, filled.facts[1]) == (4, None)


def test_latents_that_are_not_finite_are_never_stored(tmp_path: Path, records: list[Record]) -> None:
    def overflowing(pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = encode(pixels)
        mean[-1, 0, 0, 0] = float("inf")
        return mean, std

    with pytest.raises(ModelError, match=r"not finite for 1\.png\. Hold the VAE in fp32"):
        fill(tmp_path, records, job(overflowing))
    assert len(CacheStore(tmp_path)) == 0


def test_a_changed_picture_is_another_entry(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    record = Record("a.bmp", "", 0, 1, partial(Image.open, path))
    Image.new("RGB", (SIDE, SIDE), (10, 20, 30)).save(path)
    assert fill(tmp_path / "cache", [record], job()) == 2
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fill(tmp_path / "cache", [record], job()) == 2
    content[-1] ^= 1
    path.write_bytes(content)
    assert fill(tmp_path / "cache", [record], job()) == 0


def test_a_damaged_entry_is_encoded_again(tmp_path: Path, records: list[Record]) -> None:
    fill(tmp_path, records, job())
    path = CacheStore(tmp_path).shards[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store = CacheStore(tmp_path)
    assert [store.read(row) is None for row in store.rows()].count(True) == 1
    assert fill(tmp_path, records, job()) == 1
    check_all(tmp_path, records)


def test_shares_of_a_launch_are_disjoint_and_whole() -> None:
    indices = list(range(3, 30))
    parts = [FillShare(rank, 4, 0.6).of(indices) for rank in range(4)]
    assert sorted(index for part in parts for index in part) == indices


def _child(folder: Path, records: list[Record], share: FillShare, encoded: Any, limit: int) -> None:
    """Fill in another process, slowly, counting views once they are encoded; after `limit` it waits to be killed."""
    torch.set_num_threads(1)  # as loader processes do: threads do not survive a fork

    def slowly(pixels: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(0.005 if encoded.value < limit else 600)
        encoded.value += len(pixels)
        return encode(pixels)

    fill(folder, records, job(slowly), share)


def start(folder: Path, records: list[Record], share: FillShare, limit: int = 1000) -> tuple[BaseProcess, Any]:
    fork = multiprocessing.get_context("fork")
    encoded = fork.RawValue("i", 0)  # no lock, which a killed child could hold forever
    process = fork.Process(target=_child, args=(folder, records, share, encoded, limit))
    process.start()
    return process, encoded


needs_fork = pytest.mark.skipif(os.name != "posix", reason="forks and kills")


@needs_fork
def test_killed_at_any_point_it_goes_on(tmp_path: Path, records: list[Record]) -> None:
    rng = random.Random(0)
    stored = kills = 0
    for _ in range(5):
        process, encoded = start(tmp_path, records, FillShare(start=rng.random()), limit=16)
        until = rng.randrange(1, 13)
        while encoded.value < until and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        now = len(CacheStore(tmp_path))
        # What was encoded is there but for one shard of seven and the micro-batch that was being put.
        assert now - stored >= encoded.value - 7 - 4
        stored = now
    assert kills >= 1
    assert fill(tmp_path, records, job()) == 2 * COUNT - stored
    check_all(tmp_path, records)


@needs_fork
def test_two_processes_fill_one_cache(tmp_path: Path, records: list[Record]) -> None:
    both = [start(tmp_path, records, FillShare(start=place)) for place in (0.0, 0.5)]
    for process, _ in both:
        process.join()
        assert process.exitcode == 0
    # They start apart and see each other's shards: neither does all of it.
    assert 2 * COUNT <= sum(encoded.value for _, encoded in both) < 4 * COUNT
    check_all(tmp_path, records)


def test_captions_are_encoded_once(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def states(captions: list[str]) -> Tensor:
        asked.append(captions)
        return torch.stack([torch.full((3, 2), float(len(caption))) for caption in captions])

    keys = {caption: text_key(caption, "encoder", "tokenizer", {}) for caption in ("a", "bb", "", "cccc")}
    for _ in range(2):
        fill_texts(CacheStore(tmp_path), list(keys.items()), states, 3, no_progress)
    assert asked == [["a", "bb", ""], ["cccc"]]
    texts = DiskTexts(CacheStore(tmp_path), keys)
    found = texts.read("bb")
    assert found is not None and torch.equal(found, torch.full((3, 2), 2.0))
    assert texts.read("another") is None
