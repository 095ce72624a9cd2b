"""The `validation:` section: pictures and held-out figures while training, and what they decide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, model_validator

from lora_kit.recipe.base import AtLeast0, NonNegative, Positive, Problem, Section, refuse
from lora_kit.recipe.sources import SourceSection


class EarlyStop(Section):
    """When a run ends before `train.max_steps`."""

    patience: Positive = 3
    """Validations in a row without a lower held-out loss."""
    min_difference: AtLeast0 = 0.0
    """What counts as lower: by more than this."""


class ValidationSection(Section):
    """Pictures and held-out loss while training, and the figures at its end."""

    prompts: list[str] = Field(default=[])
    """Prompts drawn at step 0, every `every` steps, and in the final grid."""
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
    held_out: SourceSection | None = None
    """Pictures that are not trained on: their loss is reported as the paired difference to the base."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of `held_out`: this part of the training pictures is held out, and not trained on. Which ones depends on
    each picture's name alone, so that pictures that are added later change nothing for the others."""
    held_out_timesteps: Positive = 4
    """Stratified timesteps per held-out picture."""
    train_subset: NonNegative = 32
    """Training pictures, at most as many as are held out, that are measured in the same way: how much further the
    training loss fell is the gap that over-fitting opens. 0: none."""
    drift_prompts: list[str] = Field(default=[])
    """Prompts that have nothing to do with the data, such as `a dog in a park`: every validation tells how far the
    predictions for them moved from the base's. Adapters only, as the base's weights are needed."""
    early_stop: EarlyStop | None = None
    """End the run when the held-out loss no longer falls."""
    retrieval: bool = False
    """At the end, draw every held-out caption at strength 0 and 1 and report style (mean saturation) and
    subject (is the picture's nearest held-out picture its own, top-1 and top-5) figures."""

    @model_validator(mode="after")
    def _agrees(self) -> ValidationSection:
        refuse("ValidationSection", _problems(self))
        return self

    @property
    def measures(self) -> bool:
        """Whether there are held-out pictures."""
        return self.held_out is not None or self.held_out_fraction is not None


def _problems(section: ValidationSection) -> Iterator[Problem]:
    if section.held_out is not None and section.held_out_fraction is not None:
        said = "`validation.held_out` names pictures, this takes some of the training set's: keep one of them."
        yield Problem(("held_out_fraction",), said)
    if section.early_stop is None:
        return
    if not section.measures:
        said = "needs held-out pictures to judge by; set `held_out` or `held_out_fraction`, or remove it."
        yield Problem(("early_stop",), said)
    if not section.every:
        yield Problem(("early_stop",), "judges at every validation, and `every: 0` makes none while training.")
