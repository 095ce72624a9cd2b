"""What a validation measures: held-out and training pictures against the base, and the drift on unrelated prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from lora_kit.recipe import ValidationSection
from lora_kit.training.objects import Run
from lora_kit.training.prepared import visiting
from lora_kit.training.processes.shares import takes_part
from lora_kit.training.validation.drawing import at_strength, settings_of
from lora_kit.training.validation.drift import DRIFT_PROMPTS, STEPS, DriftReference, drift, drift_reference
from lora_kit.training.validation.held_out import MeasuredSet, draw_losses
from lora_kit.training.validation.intervals import Interval, difference_of_means, interval

Losses = list[list[float]]
"""Of each picture, at each of its timesteps."""


class Base(NamedTuple):
    """What the base makes of everything that is measured."""

    held_out: Losses
    """Empty without held-out pictures; so is the next without a training subset."""
    train: Losses
    drift: DriftReference | None = None


class Measured(NamedTuple):
    """One validation."""

    figures: dict[str, float]
    """What is logged."""
    held_out: Losses
    """Each held-out picture's losses; empty without any."""


def measure_base(run: Run, known: Base | None = None) -> Base:
    """Measure the base: before the first step, or before a checkpoint's weights are put in.

    known: losses that a checkpoint has already. Only processes that take part in validations measure.
    """
    if not takes_part(run):
        return known or Base([], [])
    with at_strength(run, 1.0 if run.is_full else 0.0), run.accelerator.autocast():
        found = known or Base(_losses(run, run.held_out), _losses(run, run.train_subset))
        return found._replace(drift=_drift_reference(run))


def measure(run: Run, base: Base, is_base: bool = False) -> Measured:
    """Measure the weights that are in the networks now; is_base: they are the base's, and nothing need be run."""
    if is_base:
        held_out, train, moved = base.held_out, base.train, 0.0 if base.drift else None
    else:
        with at_strength(run, 1.0), run.accelerator.autocast():
            held_out, train = _losses(run, run.held_out), _losses(run, run.train_subset)
            moved = drift(base.drift, run.bundle, run.learner.conditions) if base.drift else None
    count = len(run.learner.objective.alpha_bars)
    figures = held_out_figures(held_out, base.held_out, band_names(run.recipe.validation.band_count, count))
    figures |= gap_figures((held_out, base.held_out), (train, base.train))
    return Measured(figures | ({"drift": moved} if moved is not None else {}), held_out)


def measured_with(run: Run) -> str:
    """A hash of all that decides the base's losses: two validations can be compared where it is the same."""
    if run.held_out is None:
        return ""
    section, subset = run.recipe.validation, run.train_subset
    pictures = run.held_out.pictures
    ids = [run.data.records[index].id for index in subset.records] if subset else []
    parts: list[Any] = [pictures.fingerprint, ids, section.seed, section.held_out_timesteps]
    parts.append(run.recipe.objective.model_dump(mode="json"))
    if run.recipe.degradation is not None:
        parts.append(run.recipe.degradation.model_dump(mode="json"))
    if run.recipe.inpainting is not None:  # it makes the held-out pictures' masks, too
        parts.append(run.recipe.inpainting.model_dump(mode="json", exclude={"shown"}))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def held_out_figures(losses: Losses, base: Losses, bands: Sequence[str]) -> dict[str, float]:
    """Held-out loss, the base's, and their mean paired difference with its interval, over all and per band."""
    if not losses:
        return {}
    whole = paired(losses, base)
    figures = {
        "held_out_loss": mean_loss(losses),
        "held_out_base_loss": mean_loss(base),
        **whole.named("held_out_difference"),
    }
    if len(losses) > 1:
        figures["held_out_standard_error"] = whole.standard_error
    each = len(losses[0]) // len(bands)
    for index, name in enumerate(bands if len(bands) > 1 else ()):
        own = slice(index * each, (index + 1) * each)
        part = paired([row[own] for row in losses], [row[own] for row in base])
        figures |= part.named(f"held_out_difference_{name}")
    return figures


def gap_figures(held_out: tuple[Losses, Losses], train: tuple[Losses, Losses]) -> dict[str, float]:
    """The training subset's loss and difference to the base, and how much more it gained than the held-out pictures.

    Both: (losses, the base's). The gap is the held-out difference less the training one: above 0, training pictures
    gained more. As both are differences to the base, pictures that are easier for any model make no gap.
    """
    if not train[0]:
        return {}
    figures = {"train_subset_loss": mean_loss(train[0]), "train_subset_base_loss": mean_loss(train[1])}
    figures |= paired(*train).named("train_subset_difference")
    return figures | difference_of_means(differences(*held_out), differences(*train)).named("gap")


def band_names(bands: int, timesteps: int) -> list[str]:
    """`t0-249`, … `t750-999`: the equal parts of the schedule, from the least noise to the most."""
    edges = [index * timesteps // bands for index in range(bands + 1)]
    return [f"t{low}-{high - 1}" for low, high in pairwise(edges)]


def paired(losses: Losses, base: Losses) -> Interval:
    """The mean over pictures of (loss - base's loss) on the same draws, with its interval."""
    return interval(differences(losses, base))


def differences(losses: Losses, base: Losses) -> list[float]:
    """Each picture's mean loss less the base's."""
    return [_mean(own) - _mean(others) for own, others in zip(losses, base, strict=True)]


def mean_loss(losses: Losses) -> float:
    """Over pictures and timesteps."""
    return _mean([_mean(row) for row in losses])


def drift_prompts(section: ValidationSection) -> list[str]:
    """The section's, or its default."""
    if section.drift_prompts is not None:
        return section.drift_prompts
    return list(DRIFT_PROMPTS) if section.held_out is not None else []


def _losses(run: Run, measured: MeasuredSet | None) -> Losses:
    if measured is None:
        return []
    found: Tensor = draw_losses(measured, run.learner.objective, run.bundle, run.learner.conditions)
    return found.tolist()


def _drift_reference(run: Run) -> DriftReference | None:
    section, bundle = run.recipe.validation, run.bundle
    prompts = drift_prompts(section) if bundle.has_text else []
    if not prompts:
        return None
    settings = settings_of(run, min(STEPS, section.steps))
    draws = (section.held_out_timesteps, section.seed)
    with visiting(bundle, "text_encoder"):
        return drift_reference(prompts, run.learner.objective, bundle, run.learner.conditions, settings, draws)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
