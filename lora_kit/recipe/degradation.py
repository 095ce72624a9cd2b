"""The `degradation:` section: how the low-resolution picture of a super-resolution pair is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_kit.recipe.base import AtLeast0, Fraction, Problem, Section, idle, refuse

Kernel = Literal["bicubic", "bilinear", "lanczos", "hamming", "area", "nearest"]
_Range = Annotated[tuple[AtLeast0, AtLeast0], Field(strict=False)]
_Quality = Annotated[int, Field(ge=1, le=100)]
_OPTIONAL = ("blur", "noise", "jpeg")


class DegradationSection(Section):
    """What happens to the training crop until it is the low-resolution picture, in the fields' order: blurred, scaled
    down, noised, compressed. By how much it is scaled down is the model's own factor. Each step's draws derive from
    (seed, step, place in the step); held-out pictures have fixed ones.

    Only for super-resolution models. The default is plain bicubic downscaling.
    """

    blur: _Range | None = None
    """Standard deviation of a Gaussian blur, pixels of the training crop: drawn evenly between the two. Such as
    `[0.2, 2]`. Default: no blur."""
    blur_probability: Fraction = 1.0
    """How many of the pictures are blurred."""
    kernels: dict[Kernel, AtLeast0] = Field(default={"bicubic": 1.0}, min_length=1)
    """Downscaling kernels and how often each is drawn, relative to the others: `{bicubic: 2, area: 1}`. Pillow's, all
    antialiased but `nearest`; `area` is the plain mean of the pixels that become one."""
    noise: _Range | None = None
    """Standard deviation of Gaussian noise on the low-resolution picture, of 255 levels, each channel by itself: drawn
    evenly between the two. Such as `[1, 10]`. Default: no noise."""
    noise_probability: Fraction = 1.0
    """How many of the pictures get noise."""
    jpeg: Annotated[tuple[_Quality, _Quality], Field(strict=False)] | None = None
    """JPEG quality, 1 … 100: a whole number drawn evenly between the two, both included. Such as `[60, 95]`. Default:
    not compressed."""
    jpeg_probability: Fraction = 1.0
    """How many of the pictures are compressed."""

    @model_validator(mode="after")
    def _agrees(self) -> DegradationSection:
        refuse("DegradationSection", _problems(self))
        return self


def _problems(section: DegradationSection) -> Iterator[Problem]:
    for key in _OPTIONAL:
        bounds = getattr(section, key)
        if bounds is None:
            why = f"does nothing without `{key}`; set that, such as `{key}: [1, 2]`, or remove it."
            yield from idle(section, (f"{key}_probability",), why)
        elif bounds[0] > bounds[1]:
            yield Problem((key,), f"got [{bounds[0]:g}, {bounds[1]:g}]; write the smaller one first.")
    if not any(section.kernels.values()):
        yield Problem(("kernels",), "every weight is 0, so none could be drawn; give one a weight above 0.")
