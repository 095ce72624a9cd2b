"""`degradation:`: what is refused, and how it is said."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lora_kit.recipe.degradation import DegradationSection


def test_the_default_is_plain_bicubic() -> None:
    section = DegradationSection()
    assert section.kernels == {"bicubic": 1}
    assert (section.blur, section.noise, section.jpeg) == (None, None, None)


@pytest.mark.parametrize(
    ("fields", "place", "said"),
    [
        ({"blur": [2, 1]}, ("blur",), r"got \[2, 1\]; write the smaller one first"),
        ({"jpeg": [0, 50]}, ("jpeg", 0), "greater than or equal to 1"),
        ({"jpeg": [50, 101]}, ("jpeg", 1), "less than or equal to 100"),
        ({"noise": [-1, 1]}, ("noise", 0), "greater than or equal to 0"),
        ({"kernels": {"bicubic": 0}}, ("kernels",), "every weight is 0"),
        ({"kernels": {}}, ("kernels",), "at least 1 item"),
        ({"kernels": {"cubic": 1}}, ("kernels", "cubic", "[key]"), "'bicubic', 'bilinear'"),
        ({"noise_probability": 0.5}, ("noise_probability",), "does nothing without `noise`"),
        ({"blurr": [1, 2]}, ("blurr",), "Extra inputs"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], place: tuple[str | int, ...], said: str) -> None:
    with pytest.raises(ValidationError, match=said) as caught:
        DegradationSection.model_validate(fields)
    assert [error["loc"] for error in caught.value.errors()] == [place]
