"""The `validation:` section, and the trackers of `train:`."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lora_kit.recipe import Recipe
from lora_kit.recipe.messages import problems_in

DATA = {"sources": [{"path": "/pictures"}]}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"data": DATA, **sections})


def problems(**sections: Any) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        recipe(**sections)
    return {".".join(map(str, problem.path)): problem.message for problem in problems_in(caught.value)}


def test_held_out_pictures_are_a_share_a_count_or_a_source() -> None:
    share = recipe(validation={"held_out": 0.1}).validation
    assert share.split is not None and share.split.fraction == 0.1 and share.source is None
    count = recipe(validation={"held_out": {"count": 5}}).validation
    assert count.split is not None and count.split.count == 5
    source = recipe(validation={"held_out": {"path": "/others"}}).validation
    assert source.source is not None and source.split is None
    for section in (share, count, source):  # what is written is read back
        assert type(section).model_validate(section.model_dump(mode="json")) == section


@pytest.mark.parametrize(
    ("validation", "path", "said"),
    [
        ({"held_out": 1.5}, "validation.held_out", "must be below 1"),
        ({"held_out": {"fraction": 0.1, "count": 3}}, "validation.held_out", "one of them"),
        ({"held_out": {"fraction": 0.0}}, "validation.held_out.fraction", "must be above 0"),
        ({"held_out": 0.1, "bands": 3}, "validation.bands", "not a multiple"),
        ({"held_out": 0.1, "early_stop": {}, "every": 0}, "validation.early_stop", "validation.every"),
        ({"early_stop": {}}, "validation.early_stop", "needs `validation.held_out`"),
    ],
)
def test_what_cannot_be_is_said(validation: dict[str, Any], path: str, said: str) -> None:
    assert said in problems(validation=validation)[path]


def test_the_best_result_needs_a_held_out_loss_and_its_checkpoint() -> None:
    assert "needs `validation.held_out`" in problems(save={"result": "best"})["save.result"]
    found = problems(save={"result": "best", "best": False}, validation={"held_out": 0.1})
    assert "best checkpoint" in found["save.result"]


@pytest.mark.parametrize(("timesteps", "bands"), [(8, 4), (6, 2), (5, 1), (4, 4)])
def test_every_band_has_equally_many_timesteps(timesteps: int, bands: int) -> None:
    assert recipe(validation={"held_out_timesteps": timesteps}).validation.band_count == bands


def test_trackers_options_belong_to_named_ones() -> None:
    found = problems(train={"trackers": ["wandb", "tensorboard"], "tracker_options": {"wandbb": {}}})
    assert "always written" in found["train.trackers"]
    assert "does not name" in found["train.tracker_options.wandbb"]
