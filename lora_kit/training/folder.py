"""The run's folder: what is where, and whether it may be written to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from lora_kit.errors import RecipeError
from lora_kit.recipe import Recipe
from lora_kit.training.checkpoints import find_checkpoints

OURS = ("adapter.safetensors", "model", "recipe.yaml", "plan.json", "metrics.jsonl", "result.json", "skipped.txt")
OUR_FOLDERS = ("checkpoints", "samples", "logs")


class RunFolder(NamedTuple):
    """Paths of one run."""

    root: Path

    @property
    def adapter(self) -> Path:
        """The result of an adapter run."""
        return self.root / "adapter.safetensors"

    @property
    def model(self) -> Path:
        """The result of a full fine-tune: a diffusers folder."""
        return self.root / "model"

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


def prepare_folder(recipe: Recipe) -> RunFolder:
    """Make the run's folder ready to be written to. The main process does this, alone.

    Raises RecipeError if it already holds a run and the recipe neither resumes nor overwrites it.
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
    return folder


def checkpoint_to_resume(recipe: Recipe) -> Path | None:
    """The checkpoint's folder, or None to begin at step 0. Raises RecipeError if the named one is none."""
    folder = RunFolder(Path(recipe.output_dir))
    if recipe.train.resume is None:
        return None
    if recipe.train.resume == "latest":
        return next(reversed(find_checkpoints(folder.checkpoints)), None)
    path = Path(recipe.train.resume)
    if not (path / "state.json").is_file():
        known = ", ".join(p.name for p in find_checkpoints(folder.checkpoints)) or "none"
        raise RecipeError(f"train.resume: {path} is not a checkpoint. Checkpoints of this run: {known}.")
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
