"""The run's folder: what is where, and whether it may be written to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from lora_kit.errors import RecipeError, TrainingError
from lora_kit.recipe import Recipe
from lora_kit.training.checkpoints.folders import damage, find_checkpoints, newest_whole, set_damaged_aside, tidy
from lora_kit.training.checkpoints.state import damaged

OURS = (
    "adapter.safetensors",
    "adapter.ema.safetensors",
    "adapter.best.safetensors",
    "adapter.best.ema.safetensors",
    "adapter",
    "adapter.ema",
    "adapter.best",
    "adapter.best.ema",
    "embeddings",
    "embeddings.ema",
    "embeddings.best",
    "embeddings.best.ema",
    "model",
    "model_ema",
    "model_best",
    "model_best_ema",
    "recipe.yaml",
    "plan.json",
    "metrics.jsonl",
    "result.json",
    "skipped.txt",
)
OUR_FOLDERS = ("checkpoints", "samples", "logs")


class RunFolder(NamedTuple):
    """Paths of one run."""

    root: Path

    @property
    def model(self) -> Path:
        """The result of a full fine-tune: a diffusers folder."""
        return self.root / "model"

    @property
    def model_average(self) -> Path:
        """Its moving average, where the recipe keeps one."""
        return self.root / "model_ema"

    @property
    def skipped(self) -> Path:
        """Pictures that could not be used, each with its reason."""
        return self.root / "skipped.txt"

    @property
    def checkpoints(self) -> Path:
        """step-… folders."""
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        """Validation pictures."""
        return self.root / "samples"


def prepare_folder(recipe: Recipe) -> list[str]:
    """Make the run's folder ready to be written to; what the user should know. The main process does this, alone.

    What a killed process left half written is removed, and with `train.resume=latest` newest checkpoints that are not
    whole are set aside. Raises RecipeError if the folder already holds a run and the recipe neither resumes nor
    overwrites it, TrainingError if it holds checkpoints of which none is whole.
    """
    folder = RunFolder(Path(recipe.output_dir))
    held = [name for name in OURS + OUR_FOLDERS if _holds_something(folder.root / name)]
    if held and recipe.train.resume is None:
        if not recipe.train.overwrite:
            raise RecipeError(
                f"output_dir {folder.root} already holds a run ({', '.join(held)}). Continue it with "
                "train.resume=latest, replace it with train.overwrite=true, or name another output_dir."
            )
        _remove(folder, held)
    tidy(folder.checkpoints)
    notices = set_damaged_aside(folder.checkpoints) if recipe.train.resume == "latest" else []
    if notices and not find_checkpoints(folder.checkpoints):
        listed = "\n  ".join(notices)
        raise TrainingError(
            f"No checkpoint in {folder.checkpoints} is whole:\n  {listed}\nBegin anew with train.overwrite=true (it "
            "removes what is there), or with another output_dir."
        )
    return notices


def checkpoint_to_resume(recipe: Recipe) -> Path | None:
    """The checkpoint's folder, or None to begin at step 0.

    Raises RecipeError if the named one is none, TrainingError if it is damaged.
    """
    folder = RunFolder(Path(recipe.output_dir))
    if recipe.train.resume is None:
        return None
    if recipe.train.resume == "latest":
        return newest_whole(folder.checkpoints)
    path = Path(recipe.train.resume).resolve()  # `checkpoints/best` is a link
    if not path.is_dir():
        known = ", ".join(p.name for p in find_checkpoints(folder.checkpoints)) or "none"
        raise RecipeError(f"train.resume: {path} is not a checkpoint. Checkpoints of this run: {known}.")
    if reason := damage(path):
        raise damaged(path, reason)
    return path


def _holds_something(path: Path) -> bool:
    """A run that failed before its first step leaves no more than empty folders, and is nothing to keep."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _remove(folder: RunFolder, names: list[str]) -> None:
    for name in names:
        path = folder.root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
