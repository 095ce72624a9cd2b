"""The stream of samples: purity, flips, crops, caption dropout, broken pictures."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_kit.data import Batch, Records, Sample, TrainingSet, check_pictures, collate, open_training_set
from lora_kit.errors import DataError
from lora_kit.progress import no_progress
from lora_kit.recipe import DataSection

SIDE = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures of noise, 8 × 12 pixels, captioned by their numbers."""
    rng = np.random.default_rng(1)
    for index in range(6):
        values = rng.integers(0, 256, (SIDE, 12, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "text": f"number {index}"} for index in range(6)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


Open = Callable[..., TrainingSet]


@pytest.fixture
def open_set(folder: Path) -> Open:
    def build(seed: int = 0, repeats: int = 1, **fields: object) -> TrainingSet:
        whole = {"sources": [{"path": str(folder), "repeats": repeats}], "resolution": SIDE, "batch_size": 4, **fields}
        return open_training_set(DataSection.model_validate(whole), seed)

    return build


def equal(first: Sample, second: Sample) -> bool:
    assert first.pixels is not None and second.pixels is not None
    return (first.id, first.caption) == (second.id, second.caption) and torch.equal(first.pixels, second.pixels)


RANDOM = {"flip": True, "crop": "random", "caption_dropout": 0.3}


def test_samples_do_not_depend_on_what_was_asked_before(open_set: Open) -> None:
    forward, backward = open_set(**RANDOM), open_set(**RANDOM)
    later = [forward[position] for position in range(20)]
    for position in reversed(range(20)):
        assert equal(backward[position], later[position])


def test_a_copy_in_another_process_gives_the_same(open_set: Open) -> None:
    training_set = open_set(**RANDOM)
    copy: TrainingSet = pickle.loads(pickle.dumps(training_set))
    assert equal(copy[17], training_set[17])


def test_every_epoch_holds_each_record_repeats_times(open_set: Open) -> None:
    training_set = open_set(repeats=3)
    assert len(training_set) == 18
    for epoch in range(2):
        ids = Counter(training_set[epoch * 18 + place].id for place in range(18))
        assert set(ids.values()) == {3}


def test_repeats_of_one_epoch_have_draws_of_their_own(open_set: Open) -> None:
    training_set = open_set(repeats=40, flip=True)
    plain = training_set.plain(0).pixels
    assert plain is not None
    mine = [s for s in map(training_set.__getitem__, range(len(training_set))) if s.id.endswith("/0.png")]
    flipped = sum(not torch.equal(s.pixels, plain) for s in mine if s.pixels is not None)
    assert abs(flipped - 20) < 5 * math.sqrt(40 / 4)  # 5 sigma of a fair coin


def test_position_is_the_index_within_the_step(open_set: Open) -> None:
    training_set = open_set(batch_size=4)
    assert [training_set[position].position for position in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_flip_mirrors_the_picture(open_set: Open) -> None:
    training_set, plain = open_set(flip=True), open_set()
    outcomes: Counter[bool] = Counter()
    for position in range(40):
        pixels, straight = training_set[position].pixels, plain[position].pixels
        assert pixels is not None and straight is not None
        flipped = not torch.equal(pixels, straight)
        assert torch.equal(pixels, straight.flip(-1) if flipped else straight)
        outcomes[flipped] += 1
    assert abs(outcomes[True] - 20) < 5 * math.sqrt(40 / 4)


def test_random_crops_are_windows_of_the_picture(open_set: Open, folder: Path) -> None:
    training_set = open_set(crop="random")
    starts: set[int] = set()
    for position in range(60):
        sample = training_set[position]
        values = np.asarray(Image.open(folder / Path(sample.id).name)).transpose(2, 0, 1)
        assert sample.pixels is not None
        found = np.rint((sample.pixels.numpy() + 1) * 127.5).astype(np.uint8)
        starts.update(left for left in range(5) if np.array_equal(values[:, :, left : left + SIDE], found))
    assert starts == {0, 1, 2, 3, 4}  # the ends have chance 1/8 each: all are missed with odds below 1e-3, once


def test_caption_dropout_has_the_asked_frequency(open_set: Open) -> None:
    training_set, rate, count = open_set(caption_dropout=0.2), 0.2, 600
    dropped = sum(training_set[position].caption == "" for position in range(count))
    assert abs(dropped - rate * count) < 5 * math.sqrt(count * rate * (1 - rate))  # 5 sigma of a binomial


def test_turning_dropout_on_moves_no_flip(open_set: Open) -> None:
    first, second = open_set(flip=True), open_set(flip=True, caption_dropout=1.0)
    for position in range(12):
        assert torch.equal(first[position].pixels, second[position].pixels)  # pyright: ignore
        assert second[position].caption == ""


def test_trigger_stands_before_the_caption(open_set: Open) -> None:
    training_set = open_set(trigger="zwx")
    assert training_set.captions()[:2] == ["zwx number 0", "zwx number 1"]
    assert training_set[0].caption.startswith("zwx number ")


def test_plain_sample_has_nothing_random(open_set: Open, folder: Path) -> None:
    training_set = open_set(flip=True, crop="random", caption_dropout=1.0)
    sample = training_set.plain(2)
    middle = np.asarray(Image.open(folder / "2.png"))[:, 2:10].transpose(2, 0, 1)
    assert sample.caption == "number 2"
    assert sample.pixels is not None
    assert np.array_equal(np.rint((sample.pixels.numpy() + 1) * 127.5), middle)
    assert np.array_equal(np.asarray(training_set.pictures()[2]).transpose(2, 0, 1), middle)


def test_fingerprint_follows_captions(open_set: Open, folder: Path) -> None:
    before = open_set().fingerprint
    assert open_set(seed=5).fingerprint == before
    table = folder / "metadata.jsonl"
    table.write_text(table.read_text().replace("number 3", "number three"))
    assert open_set().fingerprint != before


def test_collate_stacks_in_order(open_set: Open) -> None:
    training_set = open_set()
    batch = collate([training_set[position] for position in (5, 6)])
    assert isinstance(batch, Batch)
    assert batch.positions.tolist() == [1, 2]
    assert batch.positions.dtype == torch.int64
    assert batch.ids == [training_set[5].id, training_set[6].id]
    assert batch.pixels is not None and batch.pixels.shape == (2, 3, SIDE, SIDE)
    assert batch.latent_mean is None and batch.latent_std is None


def break_pictures(folder: Path, *numbers: int) -> None:
    for number in numbers:
        path = folder / f"{number}.png"
        path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("workers", [0, 2])
def test_check_names_all_broken_pictures(open_set: Open, folder: Path, workers: int) -> None:
    break_pictures(folder, 1, 4)
    with pytest.raises(DataError) as caught:
        check_pictures(open_set(workers=workers, on_error="raise"), no_progress)
    message = str(caught.value)
    assert message.startswith("2 records of the data set cannot be used:")
    assert f"{folder.name}/1.png: not a readable picture" in message
    assert f"{folder.name}/4.png: not a readable picture" in message


def test_skip_takes_broken_pictures_out_of_the_stream(open_set: Open, folder: Path) -> None:
    break_pictures(folder, 1, 4)
    training_set = open_set(on_error="skip")
    check_pictures(training_set, no_progress)
    assert [Path(flaw.id).name for flaw in training_set.skipped] == ["1.png", "4.png"]
    assert all(flaw.reason.startswith("not a readable picture") for flaw in training_set.skipped)
    seen = {Path(training_set[position].id).name for position in range(len(training_set))}
    assert seen == {"0.png", "2.png", "3.png", "5.png"}


def test_skipping_gives_the_stream_of_the_other_pictures_alone(open_set: Open, folder: Path) -> None:
    break_pictures(folder, 1)
    with_broken = open_set(on_error="skip", **RANDOM)
    check_pictures(with_broken, no_progress)
    table = folder / "metadata.jsonl"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:1] + lines[2:]))
    without = open_set(**RANDOM)
    assert all(equal(with_broken[position], without[position]) for position in range(15))


def test_skip_list_of_an_earlier_run_is_kept_to(open_set: Open, folder: Path) -> None:
    earlier = open_set()
    skip = [(f"{folder.name}/1.png", "was broken")]
    training_set = TrainingSet(Records(earlier.records), earlier.section, 0, skip)
    assert training_set.skipped == skip
    assert training_set.record_count == 5


def test_skip_that_leaves_no_picture_is_an_error(open_set: Open, folder: Path) -> None:
    break_pictures(folder, *range(6))
    with pytest.raises(DataError, match=r"No usable picture remains; 6 records skipped"):
        check_pictures(open_set(on_error="skip"), no_progress)


def test_animations_and_enlarged_pictures_are_noticed(open_set: Open, folder: Path) -> None:
    frames = [Image.new("L", (16, 16), value) for value in (0, 255)]
    frames[0].save(folder / "0.png", save_all=True, append_images=frames[1:])
    Image.new("RGB", (SIDE - 1, 20)).save(folder / "3.png")
    training_set = open_set()
    check_pictures(training_set, no_progress)
    name = folder.name
    assert training_set.notices == [
        f"1 of 6 pictures have several frames, of which the first is used: {name}/0.png.",
        f"1 of 6 pictures are smaller than 8 pixels and were enlarged: {name}/3.png.",
    ]


def test_picture_that_vanishes_later_is_named(open_set: Open, folder: Path) -> None:
    training_set = open_set()
    (folder / Path(training_set[0].id).name).unlink()
    with pytest.raises(DataError, match=r"\.png: the file is missing"):
        training_set[0]
