"""Loaders: the union over processes and any cut is the one-process stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lora_kit.data import Batch, TrainingSet, make_loader, open_training_set
from lora_kit.errors import RecipeError
from lora_kit.recipe import Recipe


class Processes(NamedTuple):
    process_index: int = 0
    num_processes: int = 1
    device: torch.device = torch.device("cpu")


def recipe_for(folder: Path, workers: int = 0, micro: int | None = None, batch_size: int = 5) -> Recipe:
    data = {"sources": [{"path": str(folder)}], "resolution": 16, "batch_size": batch_size, "workers": workers}
    noisy = {"flip": True, "crop": "random", "caption_dropout": 0.2}
    return Recipe.model_validate({"data": {**data, **noisy}, "train": {"max_steps": 6, "micro_batch_size": micro}})


def training_set(recipe: Recipe) -> TrainingSet:
    return open_training_set(recipe.data, recipe.seed)


Rows = list[tuple[str, int, str, bytes]]


def rows(batches: list[Batch]) -> Rows:
    found: Rows = []
    for batch in batches:
        assert batch.pixels is not None
        pixels = [picture.numpy().tobytes() for picture in batch.pixels]
        found += zip(batch.ids, batch.positions.tolist(), batch.captions, pixels, strict=True)
    return found


def steps(recipe: Recipe, processes: Processes, first_step: int = 0) -> list[Rows]:
    return [rows(step) for step in make_loader(training_set(recipe), recipe, processes, first_step)]


@pytest.fixture
def whole(picture_folder: Path) -> list[Rows]:
    """The stream of one process that takes every step in one forward."""
    return steps(recipe_for(picture_folder), Processes())


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, None), (2, 1), (3, 1)])
def test_processes_and_micro_batches_together_see_the_same(
    picture_folder: Path, whole: list[Rows], world: int, micro: int | None
) -> None:
    recipe = recipe_for(picture_folder, micro=micro)
    parts = [steps(recipe, Processes(rank, world)) for rank in range(world)]
    assert [[row for part in step for row in part] for step in zip(*parts, strict=True)] == whole


def test_resumed_loader_continues_at_the_next_sample(picture_folder: Path, whole: list[Rows]) -> None:
    assert steps(recipe_for(picture_folder), Processes(), first_step=4) == whole[4:]


def test_workers_change_nothing(picture_folder: Path, whole: list[Rows]) -> None:
    assert steps(recipe_for(picture_folder, workers=2, micro=2), Processes()) == whole


def test_positions_count_through_a_step(whole: list[Rows]) -> None:
    assert [[row[1] for row in step] for step in whole] == [[0, 1, 2, 3, 4]] * 6


def test_a_micro_batch_is_no_larger_than_asked(picture_folder: Path) -> None:
    recipe = recipe_for(picture_folder, micro=2)
    loader = make_loader(training_set(recipe), recipe, Processes())
    assert [len(batch.ids) for batch in next(iter(loader))] == [2, 2, 1]


def test_batch_smaller_than_the_processes(picture_folder: Path) -> None:
    recipe = recipe_for(picture_folder, batch_size=1)
    with pytest.raises(RecipeError, match=r"data.batch_size \(1\) is below the number of processes \(2\)"):
        make_loader(training_set(recipe), recipe, Processes(0, 2))


def test_shared_folder_fixture_is_read(make_picture_folder: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_for(make_picture_folder(tmp_path / "two", count=2), batch_size=4)
    ids = [row[0] for step in steps(recipe, Processes()) for row in step]
    assert set(ids) == {"two/000.png", "two/001.png"}
    assert len(ids) == 24  # six steps of four: epochs of two follow one another within a step
