"""Which validation was best, whether that is more than chance, and whether it is time to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_kit.recipe import EarlyStopSection
from lora_kit.training.checkpoints.state import Progress
from lora_kit.training.validation.measuring import Measured, paired


def with_validation(progress: Progress, measured: Measured) -> Progress:
    """The progress with the validation of its step in its history, and the losses of the best and the last one."""
    entry = {"step": progress.step, **measured.figures}
    after = replace(progress, history=[*progress.history, entry], last_losses=measured.held_out)
    is_best = after.best is not None and after.best["step"] == progress.step
    return replace(after, best_losses=measured.held_out) if is_best else after


def reason_to_stop(history: Sequence[dict[str, float]], section: EarlyStopSection | None) -> str:
    """Why the run ends after the last of `history`; empty if it goes on.

    A function of the history alone, which a checkpoint holds: a resumed run comes to the same.
    """
    measured = [entry for entry in history if "held_out_loss" in entry]
    if section is None or not measured:
        return ""
    lowest, since = measured[0], 0
    for entry in measured[1:]:
        if entry["held_out_loss"] < lowest["held_out_loss"] - section.min_difference:
            lowest, since = entry, 0
        else:
            since += 1
    if since < section.patience:
        return ""
    by = f" by more than {section.min_difference:g}" if section.min_difference else ""
    return (
        f"stopped early after step {measured[-1]['step']:.0f}: {since} validations in a row were not below the "
        f"held-out loss of step {lowest['step']:.0f}, {lowest['held_out_loss']:.4f}{by} (validation.early_stop)"
    )


def verdict(progress: Progress) -> dict[str, Any]:
    """What result.json says of the best step; empty without held-out pictures.

    The last less the best on the same draws, paired over pictures: above 0, the best is better.
    """
    best = progress.best
    if best is None or not progress.best_losses or not progress.last_losses:
        return {}
    last = int(next(entry for entry in reversed(progress.history) if "held_out_loss" in entry)["step"])
    difference = paired(progress.last_losses, progress.best_losses)
    found = {"best_step": int(best["step"]), "last_step": last, "best_held_out_loss": best["held_out_loss"]}
    return found | difference.named("last_less_best") | {"last_differs_from_best": difference.tells}


def verdict_line(figures: dict[str, Any]) -> str:
    """The verdict for a reader."""
    best, last = figures["best_step"], figures["last_step"]
    if best == last:
        return f"best step: {best}, the last: no validation before it had a lower held-out loss"
    where = f"best step: {best}" if best else "best step: 0, the base itself: training has made the held-out loss worse"
    difference = f"{figures['last_less_best']:+.4f}"
    if "last_less_best_low" not in figures:
        return f"{where}; the last, {last}, is {difference} from it, and one picture tells no more"
    ends = f"{figures['last_less_best_low']:+.4f} to {figures['last_less_best_high']:+.4f}"
    said = "more than chance would give" if figures["last_differs_from_best"] else "which chance may have given"
    return f"{where}; the last, {last}, is {difference} from it (95 %: {ends}), {said}"
