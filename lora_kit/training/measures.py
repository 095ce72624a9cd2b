"""What a validation measures, and what follows from it: the gap, the best step, when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lora_kit.recipe.validation import EarlyStop
from lora_kit.training.held_out import band_count
from lora_kit.training.statistics import Interval, difference, interval

Losses = Sequence[Sequence[float]]
"""A picture's loss at each of its timesteps, picture by picture."""


class Measured(NamedTuple):
    """Losses of the held-out pictures, and of the training pictures that are measured like them."""

    held_out: list[list[float]]
    trained: list[list[float]]


def figures(now: Measured, base: Measured) -> dict[str, float]:
    """By name, as in metrics.jsonl. A difference is (loss - base's loss) on the same draws, mean over pictures:
    negative is better than the base; `_interval` is half its 95 % confidence interval."""
    losses, base_losses = means(now.held_out), means(base.held_out)
    pair = paired(losses, base_losses)
    found = {
        "held_out_loss": sum(losses) / len(losses),
        "held_out_base_loss": sum(base_losses) / len(losses),
        "held_out_difference": pair.mean,
        "held_out_standard_error": pair.standard_error,
        "held_out_interval": pair.half_width,
    }
    bands = band_count(len(now.held_out[0]))
    for band in range(bands if bands > 1 else 0):
        one = paired(_band(now.held_out, band, bands), _band(base.held_out, band, bands))
        found[f"held_out_difference_band_{band + 1}"] = one.mean
        found[f"held_out_interval_band_{band + 1}"] = one.half_width
    if now.trained:
        trained = paired(means(now.trained), means(base.trained))
        gap = difference(pair, trained, (len(now.held_out), len(now.trained)))
        found |= {"trained_difference": trained.mean, "gap": gap.mean, "gap_interval": gap.half_width}
    return found


def paired(losses: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean difference, picture by picture."""
    return interval([loss - other for loss, other in zip(losses, others, strict=True)])


def means(losses: Losses) -> list[float]:
    """Each picture's mean over its timesteps."""
    return [sum(own) / len(own) for own in losses]


def is_over(history: Sequence[Mapping[str, float]], rule: EarlyStop | None) -> bool:
    """Whether the validations done so far end the run early."""
    if rule is None:
        return False
    lowest, since = float("inf"), 0
    for entry in history:
        if "held_out_loss" not in entry:
            continue
        if entry["held_out_loss"] < lowest - rule.min_difference:
            lowest, since = entry["held_out_loss"], 0
        else:
            since += 1
    return since >= rule.patience


def verdict(step: int, best_step: int, against_last: Interval) -> str:
    """A line for the reader. against_last: last - best, picture by picture."""
    if best_step == step:
        return f"best held-out loss: the last step, {step}."
    told = f"best held-out loss: step {best_step}, not the last; last - best {against_last.mean:+.4f} ± "
    told += f"{against_last.half_width:.4f} (95 %)"
    if against_last.mean - against_last.half_width > 0:
        return f"{told}: the best is better."
    return f"{told}: they cannot be told apart."


def _band(losses: Losses, band: int, bands: int) -> list[float]:
    size = len(losses[0]) // bands
    return [sum(own[band * size : (band + 1) * size]) / size for own in losses]
