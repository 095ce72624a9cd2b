"""The `train:` keys that name experiment trackers beside metrics.jsonl and TensorBoard."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from lora_kit.recipe.base import Problem, Section, idle, refuse


class TrackerSection(Section):
    """Where else the figures go."""

    trackers: list[str] = Field(default=[])
    """Accelerate's trackers, by its names: `wandb`, `comet_ml`, `mlflow`, `aim`, `clearml`, `dvclive`, `swanlab`,
    `trackio`, or one registered with it. Each needs its own package. metrics.jsonl and TensorBoard are always there."""
    tracker_project: str = Field(default="lora_kit", min_length=1)
    """The project that trackers file the run under."""
    tracker_options: dict[str, dict[str, Any]] = Field(default={})
    """By tracker, what it is started with: `{wandb: {name: red-7, tags: [style]}}`. Handed over as they are."""

    @model_validator(mode="after")
    def _trackers_agree(self) -> TrackerSection:
        problems = [
            Problem(("trackers",), f"`{name}` is named twice.")
            for name in dict.fromkeys(self.trackers)
            if self.trackers.count(name) > 1
        ]
        if "tensorboard" in self.trackers:
            said = "`tensorboard` is always written, to logs/ in the run's folder; leave it out."
            problems.append(Problem(("trackers",), said))
        for name in self.tracker_options:
            if name not in self.trackers:
                known = ", ".join(self.trackers) or "none"
                said = f"options of a tracker that `train.trackers` does not name (it names: {known}); add it there."
                problems.append(Problem(("tracker_options", name), said))
        if not self.trackers:
            problems += idle(self, ("tracker_project",), "does nothing without `train.trackers`; name one.")
        refuse("TrackerSection", problems)
        return self
