"""The `validation:` section: what a run is measured on, what is drawn, and when it may end early."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from lora_kit.recipe.base import AtLeast0, NonNegative, Positive, Problem, Section, refuse
from lora_kit.recipe.buckets import side_problem
from lora_kit.recipe.sources import SourceSection

if TYPE_CHECKING:
    from lora_kit.recipe.sections import Recipe

Share = Annotated[float, Field(gt=0, lt=1)]
"""Part of the training pictures, above 0 and below 1."""
MOST_BANDS = 4


class SplitSection(Section):
    """Pictures taken from `data.sources` and not trained on: a `fraction` or a `count` of them.

    The SHA-256 of a picture's bytes decides, so that a renamed, repeated or doubled picture stays on its side.
    """

    fraction: Share | None = None
    """Each picture is held out with this chance, by its hash: pictures added later move no other, and a picture once
    held out always is. Of n pictures about `fraction` × n."""
    count: Positive | None = None
    """Exactly so many: those with the lowest hashes. A picture added later can take the place of one."""

    @model_validator(mode="after")
    def _is_one(self) -> SplitSection:
        if (self.fraction is None) == (self.count is None):
            refuse("SplitSection", [Problem((), "needs `fraction` or `count`, one of them.")])
        return self


class EarlyStopSection(Section):
    """When a run ends before `train.max_steps`."""

    patience: Positive = 3
    """Validations in a row that may bring no lower held-out loss; the run ends at the last of them."""
    min_difference: AtLeast0 = 0.0
    """By how much a validation must be below the lowest before it to count as lower, in units of the loss."""


def _kind(held_out: Any) -> str:
    if isinstance(held_out, float):
        return "<share>"
    keys = held_out if isinstance(held_out, dict) else type(held_out).model_fields if _is_split(held_out) else ()
    return "<split>" if "path" not in keys and {"fraction", "count"} & set(keys) else "<source>"


def _is_split(held_out: Any) -> bool:
    return isinstance(held_out, SplitSection)


HeldOutPictures: TypeAlias = Annotated[
    Annotated[Share, Tag("<share>")]
    | Annotated[SplitSection, Tag("<split>")]
    | Annotated[SourceSection, Tag("<source>")],
    Discriminator(_kind),
]
"""A part of the training pictures, or pictures of their own."""
HELD_OUT_TAGS: dict[str, type[Section]] = {"<split>": SplitSection, "<source>": SourceSection}
"""As `rules.SECTION_OF_TAG`."""


class ValidationSection(Section):
    """Pictures and held-out loss while training, and the figures at its end."""

    prompts: list[str] = Field(default=[])
    """Prompts drawn at step 0, every `every` steps, and in the final grids."""
    negative_prompt: str = ""
    """Negative prompt of all validation pictures."""
    every: NonNegative = 100
    """Optimizer steps between validations. 0: only at step 0 and at the end."""
    seed: NonNegative = 0
    """Seed of all validation pictures and of the held-out noise."""
    steps: Positive = 25
    """Sampler steps."""
    guidance: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance scale; 1 or less turns it off."""
    strengths: list[float] = Field(default=[0.0, 0.5, 1.0], min_length=1)
    """Adapter strengths of samples/final_grid.png, left to right."""
    step_grid: bool = True
    """At the end, a sheet for each prompt, samples/steps-….png: a row for each of `strengths`, a column for each
    validation. Draws the prompts at every strength but 0 at each validation, not at 1 alone."""
    held_out: HeldOutPictures | None = None
    """Pictures that are not trained on: their loss is reported as the paired difference to the base. A part of
    `data.sources` (`0.1`, `{fraction: 0.1}` or `{count: 32}`), or a source of their own (`{path: …}`)."""
    held_out_timesteps: Positive = 4
    """Stratified timesteps per held-out picture."""
    bands: Positive | None = None
    """Equal parts of the noise schedule that the difference to the base is told of one by one; `held_out_timesteps`
    must be a multiple. Default: the most of 4, 2, 1 that it is a multiple of."""
    train_subset: bool = True
    """With `held_out`: measure as many training pictures too, the same ones each time, as they are. The gap between
    what the base is beaten by on each is memorising, not learning."""
    drift_prompts: list[str] | None = None
    """Prompts that have nothing to do with the training pictures: how far the predictions for them move from the
    base's. Default: eight of daily things if there is a `held_out`, otherwise none. `[]`: none."""
    early_stop: EarlyStopSection | None = None
    """End the run once the held-out loss has stopped falling. `{}` takes the section's defaults."""
    restored: NonNegative = 16
    """Held-out pictures that a super-resolution model enlarges at each validation, the first ones: their PSNR and SSIM
    beside those of bicubic enlarging, and a sheet. 0: none. Does nothing for other models."""
    retrieval: bool = False
    """At the end, draw every held-out caption at strength 0 and 1 and report style (mean saturation) and
    subject (is the picture's nearest held-out picture its own, top-1 and top-5) figures."""

    @property
    def source(self) -> SourceSection | None:
        """The held-out pictures' own source, if they have one."""
        return self.held_out if isinstance(self.held_out, SourceSection) else None

    @property
    def split(self) -> SplitSection | None:
        """The part of the training pictures that is held out, if it is one."""
        if isinstance(self.held_out, float):
            return SplitSection(fraction=self.held_out)
        return self.held_out if isinstance(self.held_out, SplitSection) else None

    @property
    def band_count(self) -> int:
        """`bands`, or its default."""
        return self.bands or math.gcd(self.held_out_timesteps, MOST_BANDS)


def validation_problems(recipe: Recipe) -> Iterator[Problem]:
    """What of `validation` cannot be done with the recipe's other sections."""
    section = recipe.validation
    if section.held_out is None:
        yield from _without_held_out(section)
    if section.bands is not None and section.held_out_timesteps % section.bands:
        said = f"got {section.bands}, but `held_out_timesteps` is {section.held_out_timesteps}, not a multiple of it."
        yield Problem(("validation", "bands"), f"{said} Each band needs equally many of a picture's timesteps.")
    if section.early_stop is not None and section.every == 0:
        said = "needs validations while training: set `validation.every` above 0."
        yield Problem(("validation", "early_stop"), said)
    source = section.source
    side = (source and source.resolution) or recipe.data.resolution
    said = side_problem(recipe.data.buckets, side) if source else None
    if said:
        where = ("validation", "held_out", "resolution") if source and source.resolution else ("data", "resolution")
        yield Problem(where, f"{said} Held-out pictures are measured at it.")
    for index, trained in enumerate(recipe.data.sources):
        same = ("path", "config", "split", "where")
        if source and all(getattr(trained, key) == getattr(source, key) for key in same):
            said = f"is the same set as data.sources.{index}, which is trained on; name other pictures, part them with "
            yield Problem(("validation", "held_out"), f"{said}`where`, or hold a part of it out: `held_out: 0.1`.")


def result_problems(recipe: Recipe) -> Iterator[Problem]:
    """`save.result`: the best step is known only where there is a held-out loss, and kept only if asked."""
    if recipe.save.result != "best":
        return
    if recipe.validation.held_out is None:
        yield Problem(("save", "result"), "`best` needs `validation.held_out`, whose loss tells the best step.")
    if not recipe.save.best:
        yield Problem(("save", "result"), "`best` needs the best checkpoint: remove `save.best: false`.")


def _without_held_out(section: ValidationSection) -> Iterator[Problem]:
    if section.retrieval:
        said = "`retrieval: true` needs `validation.held_out`: captions to draw and pictures to compare with."
        yield Problem(("validation", "retrieval"), said)
    for key in ("early_stop", "bands"):
        if getattr(section, key) is not None:
            yield Problem(("validation", key), "needs `validation.held_out`, whose loss it is about.")
