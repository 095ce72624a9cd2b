"""Training sets with buckets: what samples are, cached and not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_kit.data import TrainingSet, cache_latents, check_pictures, make_loader, open_training_set, plain_section
from lora_kit.data.bucket_plan import bucket_plan
from lora_kit.errors import DataError
from lora_kit.progress import no_progress
from lora_kit.recipe import DataSection, Recipe, SourceSection

SIZES = [(40, 24), (24, 40), (32, 32), (36, 36), (40, 24), (16, 18), (100, 24)]
"""Of the folder's pictures. At 32 pixels with step 8 they go to 40 × 24, 24 × 40, 32 × 32 (twice), 40 × 24, 16 × 16 and
64 × 16."""
BUCKETS = {"step": 8}


class Processes(NamedTuple):
    process_index: int = 0
    num_processes: int = 1
    device: torch.device = torch.device("cpu")


def write_pictures(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(3)
    for index, (width, height) in enumerate(sizes):
        values = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "text": f"number {index}"} for index in range(len(sizes))]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "set", SIZES)


def section_of(folder: Path, **fields: object) -> DataSection:
    whole = {"sources": [{"path": str(folder)}], "resolution": 32, "batch_size": 2, "buckets": BUCKETS, **fields}
    return DataSection.model_validate(whole)


Open = Callable[..., TrainingSet]


@pytest.fixture
def open_set(folder: Path) -> Open:
    return lambda **fields: open_training_set(section_of(folder, **fields), 0, bar=no_progress)


def epoch(training_set: TrainingSet, number: int = 0) -> list[int]:
    """The positions of an epoch."""
    batch, steps = training_set.section.batch_size, int(training_set.order.steps_per_epoch)
    return [
        step * batch + place
        for step in range(number * steps, (number + 1) * steps)
        for place in range(training_set.order.size_of(step))
    ]


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """A stand-in for the VAE that treats every pixel alone, so that batching cannot change a bit."""
    left = torch.linspace(0, 1, pixels.shape[-1])
    mean = torch.cat([pixels * left, pixels[:, :1] * 2], 1)[..., ::2, ::2]
    return mean, mean.square() + 0.1


def test_every_sample_has_its_buckets_size(open_set: Open) -> None:
    training_set = open_set()
    wanted = [(40, 24), (24, 40), (32, 32), (32, 32), (40, 24), (16, 16), (64, 16)]
    assert [training_set.places.sizes_of(record) for record in range(7)] == [[size] for size in wanted]
    for position in epoch(training_set):
        sample = training_set[position]
        width, height = wanted[int(Path(sample.id).stem)]
        assert sample.pixels is not None and sample.pixels.shape == (3, height, width)


def test_fitting_pictures_keep_all_their_pixels(open_set: Open, folder: Path) -> None:
    training_set = open_set()
    for record in (0, 1, 2):
        pixels = training_set.plain(record).pixels
        assert pixels is not None
        values = np.asarray(Image.open(folder / f"{record}.png")).transpose(2, 0, 1)
        assert np.array_equal(np.rint((pixels.numpy() + 1) * 127.5), values)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_cached_equals_uncached_bit_for_bit(open_set: Open, micro_batch: int, workers: int) -> None:
    cached = open_set(flip=True, workers=workers)
    plain = open_set(flip=True, cache="none")
    cache_latents(cached, encode, micro_batch, no_progress)
    for position in [*epoch(plain), *epoch(plain, 1)]:
        mine, other = cached[position], plain[position]
        mine_said = (mine.id, mine.position, mine.caption, mine.step_samples)
        assert mine_said == (other.id, other.position, other.caption, other.step_samples)
        assert mine.pixels is None and other.pixels is not None
        mean, std = encode(other.pixels[None])
        assert mine.latent_mean is not None and torch.equal(mine.latent_mean, mean[0])
        assert mine.latent_std is not None and torch.equal(mine.latent_std, std[0])


def test_many_buckets_do_not_hold_many_pictures(tmp_path: Path) -> None:
    # 12 buckets of one picture each, and one of 13: none but the last fills a micro-batch of 4.
    shapes = [(8, 8 * n) for n in range(4, 10)] + [(8 * n, 8) for n in range(4, 10)] + [(32, 32)] * 13
    folder = write_pictures(tmp_path / "many", shapes)
    section = section_of(folder, buckets={"step": 8, "min_side": 8, "max_side": 128})
    training_set = open_training_set(section, 0, bar=no_progress)
    held: list[int] = []

    def counting(pixels: Tensor) -> tuple[Tensor, Tensor]:
        held.append(len(pixels))
        return encode(pixels)

    cache_latents(training_set, counting, 4, no_progress)
    assert sum(held) == len(shapes)
    assert max(held) == 4
    other = open_training_set(section, 0, bar=no_progress)
    for record in range(len(shapes)):
        plain = other.plain(record).pixels
        assert plain is not None
        assert torch.equal(training_set.plain(record).latent_mean, encode(plain[None])[0][0])  # pyright: ignore


def test_broken_pictures_leave_the_others_in_their_buckets(open_set: Open, folder: Path) -> None:
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[: len(content) // 2])  # its header is whole
    (folder / "4.png").write_bytes(b"no header")
    training_set = open_set(on_error="skip")
    cache_latents(training_set, encode, 2, no_progress)
    assert [Path(flaw.id).name for flaw in training_set.skipped] == ["2.png", "4.png"]
    assert training_set.latents is not None
    held = Counter(training_set.places.size(place) for place in range(len(training_set.places.record)))
    assert held == {(40, 24): 1, (24, 40): 1, (32, 32): 1, (16, 16): 1, (64, 16): 1}
    ids = {Path(training_set[position].id).stem for position in epoch(training_set)}
    assert ids == {"0", "1", "3", "5", "6"}


def test_broken_pictures_of_both_kinds_are_named_together(open_set: Open, folder: Path) -> None:
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[: len(content) // 2])
    (folder / "4.png").write_bytes(b"no header")
    with pytest.raises(DataError, match=r"(?s)2 records .*2\.png: .*4\.png: "):
        check_pictures(open_set(on_error="raise"), no_progress)


def test_pictures_that_are_too_small_are_told(open_set: Open, folder: Path) -> None:
    training_set = open_set()
    check_pictures(training_set, no_progress)
    (said,) = training_set.notices
    assert said.startswith("1 of 7 pictures are smaller than their bucket and go to a smaller one")
    assert said.endswith("set/5.png.")
    larger = open_set(buckets={"step": 8, "upscale": True})
    check_pictures(larger, no_progress)
    assert larger.notices == ["1 of 7 pictures are smaller than their bucket and were enlarged: set/5.png."]


def test_random_crops_reach_both_ends_of_the_longer_side(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "wide", [(48, 24)])  # 40 × 24 is nearest: 5/3 of 2, 48 × 16's 3 of 2
    section = section_of(folder, crop="random", batch_size=1)
    training_set = open_training_set(section, 0, bar=no_progress)
    values = np.asarray(Image.open(folder / "0.png")).transpose(2, 0, 1)
    lefts: set[int] = set()
    for position in range(80):
        pixels = training_set[position].pixels
        assert pixels is not None
        found = np.rint((pixels.numpy() + 1) * 127.5)
        lefts.update(left for left in range(9) if np.array_equal(values[:, :, left : left + 40], found))
    assert lefts == set(range(9))  # the ends have odds 1/16 each: one is missed with under 2 × (15/16)^80 = 1 %, once


def test_wrapped_samples_have_draws_of_their_own(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "one", [(48, 24)])
    training_set = open_training_set(section_of(folder, crop="random", batch_size=6), 0, bar=no_progress)
    crops = {training_set[position].pixels.numpy().tobytes() for position in range(6)}  # pyright: ignore
    assert len(crops) > 1


def test_sources_of_several_resolutions_without_buckets(tmp_path: Path) -> None:
    sources = [
        {"path": str(write_pictures(tmp_path / "a", SIZES[:3])), "resolution": 16},
        {"path": str(write_pictures(tmp_path / "b", SIZES[:2])), "repeats": 2},
    ]
    section = section_of(tmp_path, sources=sources, buckets=None)
    training_set = open_training_set(section, 0, bar=no_progress)
    found = Counter((Path(training_set[p].id).parent.name, training_set[p].pixels.shape) for p in epoch(training_set))  # pyright: ignore
    # Three of 16 pixels fill two batches of two, so one is shown once more.
    assert found == {("a", (3, 16, 16)): 4, ("b", (3, 32, 32)): 4}
    check_pictures(training_set, no_progress)
    assert training_set.notices == [
        "2 of 5 pictures are smaller than their bucket and were enlarged: b/0.png, b/1.png."
    ]


def test_one_resolution_for_all_sources_is_the_plain_stream(folder: Path) -> None:
    squares = section_of(folder, buckets=None)
    same = section_of(folder, buckets=None, resolution=8, sources=[{"path": str(folder), "resolution": 32}])
    first, second = (open_training_set(section, 0, bar=no_progress) for section in (squares, same))
    for position in range(21):
        mine, other = first[position], second[position]
        assert mine.id == other.id
        assert torch.equal(mine.pixels, other.pixels)  # pyright: ignore


def test_each_picture_at_each_resolution_that_it_fills(open_set: Open) -> None:
    training_set = open_set(buckets={"step": 8, "resolutions": [16, 32]}, flip=True)
    assert training_set.places.sizes_of(0) == [(16, 16), (40, 24)]  # 24 × 8 and 16 × 16 are 9/5 and 5/3 off
    assert training_set.places.sizes_of(5) == [(16, 16)]
    cache_latents(training_set, encode, 3, no_progress)
    shapes = Counter(training_set[p].latent_mean.shape[1:] for p in epoch(training_set))  # pyright: ignore
    assert sum(shapes.values()) >= len(training_set) == len(training_set.places.record) == 13
    held_out = plain_section(training_set.section, training_set.section.sources[:1])
    assert open_training_set(held_out, 0, bar=no_progress).places.sizes_of(0) == [(40, 24)]


def test_a_source_keeps_to_its_own_resolution(folder: Path) -> None:
    source = SourceSection(path=str(folder), resolution=16)
    section = section_of(folder, sources=[source], buckets={"step": 8, "resolutions": [24, 32]})
    sizes = open_training_set(section, 0, bar=no_progress).places.sizes
    assert max(width * height for width, height in sizes) <= 16**2


def test_fingerprint_follows_the_buckets(open_set: Open) -> None:
    assert open_set().fingerprint == open_set().fingerprint
    assert open_set().fingerprint != open_set(buckets={"step": 16}).fingerprint


@pytest.mark.parametrize("short", ["wrap", "short"])
def test_plan_agrees_with_what_is_trained(open_set: Open, short: str) -> None:
    training_set = open_set(buckets={"step": 8, "short": short}, batch_size=3)
    assert training_set.sizes is not None
    plan = bucket_plan(training_set.records, training_set.sizes, training_set.section)
    trained = Counter(training_set[p].pixels.shape[1:] for p in epoch(training_set))  # pyright: ignore
    assert trained == {(b.height, b.width): b.samples + b.wrapped for b in plan.buckets}
    assert plan.steps == training_set.order.steps_per_epoch == sum(bucket.steps for bucket in plan.buckets)
    for bucket in plan.buckets:
        assert bucket.samples + bucket.wrapped + bucket.missing == 3 * bucket.steps
    assert (plan.pictures, plan.samples, plan.unreadable) == (7, 7, 0)
    crops = {(b.width, b.height): (b.mean_crop, b.largest_crop) for b in plan.buckets}
    assert crops[(40, 24)] == (0.0, 0.0)
    # 100 × 24 to a shape of 4: 96 of 100 columns stay.
    assert crops[(64, 16)] == pytest.approx((4.0, 4.0))
    assert sum(bucket.lowered for bucket in plan.buckets) == 1


def loaded(folder: Path, short: str, world: int, micro: int | None) -> list[list[tuple[str, int, int, bytes]]]:
    data = section_of(folder, buckets={"step": 8, "short": short}, batch_size=3, crop="random", flip=True)
    recipe = Recipe.model_validate({"data": data, "train": {"max_steps": 9, "micro_batch_size": micro}})
    steps: list[list[tuple[str, int, int, bytes]]] = [[] for _ in range(9)]
    for rank in range(world):
        training_set = open_training_set(data, recipe.seed, bar=no_progress)
        for rows, batches in zip(steps, make_loader(training_set, recipe, Processes(rank, world)), strict=True):
            for batch in batches:
                assert batch.pixels is not None
                found = zip(batch.ids, batch.positions.tolist(), batch.pixels, strict=True)
                rows += [(name, place, batch.step_samples, p.numpy().tobytes()) for name, place, p in found]
    return steps


@pytest.mark.parametrize("short", ["wrap", "short"])
def test_processes_and_micro_batches_together_see_the_same(folder: Path, short: str) -> None:
    whole = loaded(folder, short, 1, None)
    for rows in whole:
        assert [row[1] for row in rows] == list(range(len(rows)))
        assert {row[2] for row in rows} == {len(rows)}
    assert {len(rows) for rows in whole} == ({3} if short == "wrap" else {1, 2})
    for world, micro in ((1, 2), (2, None), (3, 1)):
        assert loaded(folder, short, world, micro) == whole
