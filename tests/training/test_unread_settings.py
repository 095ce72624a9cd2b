"""Settings that the data room reads and training does not follow yet are refused, not dropped."""

from __future__ import annotations

import pytest

from lora_kit.errors import RecipeError
from lora_kit.recipe import DataSection
from lora_kit.training.build import refuse_unread


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"cache": "disk", "sources": [{"path": "a"}]}, "data.cache: disk"),
        ({"alpha": "mask", "sources": [{"path": "a"}]}, "alpha: mask"),
        ({"sources": [{"path": "a", "alpha": "mask"}]}, "alpha: mask"),
        ({"sources": [{"path": "a", "loss_weight": 0.5}]}, "loss_weight"),
    ],
)
def test_what_training_would_ignore_is_refused(section, said):
    with pytest.raises(RecipeError, match=said):
        refuse_unread(DataSection.model_validate(section))


def test_nothing_else_is():
    refuse_unread(DataSection.model_validate({"sources": [{"path": "a"}]}))
