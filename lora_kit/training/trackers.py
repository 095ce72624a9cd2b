"""Accelerate's experiment trackers, by name: what a recipe asks for is checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from lora_kit.adapters import public_recipe
from lora_kit.errors import RecipeError, did_you_mean
from lora_kit.recipe import Recipe
from lora_kit.recipe.yaml12 import Tree, parse

_PACKAGES = {"comet_ml": "comet-ml"}
"""Where a tracker's package on PyPI is not called as the tracker."""


def check_trackers(recipe: Recipe) -> None:
    """Raise RecipeError, naming all of them, for trackers that Accelerate does not know or whose package is missing."""
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS if str(name) != "tensorboard")
    installed = {str(name) for name in get_available_trackers()}
    problems: list[str] = []
    for name in recipe.train.trackers:
        if name not in known:
            problems.append(f"got {name}; allowed: {', '.join(known)}.{did_you_mean(name, known)}")
        elif name in LoggerType.list() and name not in installed:
            package = _PACKAGES.get(name, name)
            problems.append(f"{name} needs a package that is not installed: pip install {package}, or leave it out.")
    if problems:
        raise RecipeError("\n".join(f"train.trackers: {problem}" for problem in problems))


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Begin a run with each tracker that `accelerator` was made for; they are told the recipe, without this machine's
    paths."""
    section = recipe.train
    if section.trackers:
        config = flat_config(parse(public_recipe(recipe, folder_names=recipe.save.captions), "the recipe"))
        accelerator.init_trackers(section.tracker_project, config, section.tracker_options)


def stop_trackers(accelerator: Accelerator) -> None:
    """End the trackers' runs. Not `end_training`, which ends the processes' group as well."""
    for tracker in accelerator.trackers:
        if accelerator.is_main_process or not tracker.main_process_only:
            tracker.finish()


def logging_folder(recipe: Recipe) -> Path | None:
    """Where trackers that write files put them."""
    return Path(recipe.output_dir) / "logs" if recipe.train.trackers else None


def track_picture(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Hand a picture to those trackers that take pictures."""
    for tracker in accelerator.trackers:
        log_images: Any = getattr(tracker, "log_images", None)
        if log_images is not None:
            log_images({name: [image.convert("RGB")]}, step=step)


def flat_config(tree: Tree, above: str = "") -> dict[str, Any]:
    """`{"optimizer.lr": 0.001, …}`: what every tracker can hold; lists and null as text."""
    if not isinstance(tree, dict):
        plain = isinstance(tree, int | float | str)
        return {above: tree if plain else str(tree)}
    return {
        key: value
        for name, part in tree.items()
        for key, value in flat_config(part, f"{above}.{name}" if above else str(name)).items()
    }
