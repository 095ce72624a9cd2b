"""What `accelerate launch` started: device, processes, threads."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs

from lora_kit.errors import RecipeError, did_you_mean
from lora_kit.recipe import Recipe, dump_recipe
from lora_kit.training.launcher import Sharding, take_sharding
from lora_kit.training.sharding import check_sharding

_PACKAGES = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Accelerate's own trackers and their packages; one that is registered by other code is taken as it is."""


class LaunchedAccelerator(Accelerator):
    """Accelerate's, which also knows whether the launch asked for FSDP."""

    sharding: Sharding | None = None


def sharding_of(accelerator: Accelerator) -> Sharding | None:
    """How networks are to be spread over the processes; None: each has all of them."""
    return getattr(accelerator, "sharding", None)


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Device, processes and autocast. Raises RecipeError for what the machine cannot do.

    recipe: as `follow_launcher` gives it.
    """
    if recipe.train.mixed_precision == "fp16" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise RecipeError("train.mixed_precision: fp16 needs a GPU and none was found. Use bf16 or no.")
    check_trackers(recipe)
    trackers: Any = recipe.train.trackers or None
    sharding = take_sharding()
    if sharding is not None:
        check_sharding(recipe)
    # Processes wait for each other while the first one draws and measures: torch's own limit is ten minutes.
    wait = InitProcessGroupKwargs(timeout=timedelta(minutes=recipe.train.wait_minutes))
    accelerator = LaunchedAccelerator(
        mixed_precision=recipe.train.mixed_precision,
        kwargs_handlers=[wait],
        log_with=trackers,
        project_dir=Path(recipe.output_dir) / "logs",
    )
    accelerator.sharding = sharding
    if accelerator.num_processes == 1 and _was_to_be_several():
        raise RecipeError(
            "`accelerate launch` was asked for several processes, and started one: with --cpu it starts more only "
            "through mpirun. Launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N …"
        )
    use_cores(accelerator)
    if recipe.data.batch_size < accelerator.num_processes:
        raise RecipeError(
            f"data.batch_size ({recipe.data.batch_size}) is the whole step's and must be at least the number of "
            f"processes ({accelerator.num_processes}). Raise it, or launch fewer processes."
        )
    return accelerator


def check_trackers(recipe: Recipe) -> None:
    """Raise RecipeError for a tracker that Accelerate does not know, or whose package is not installed."""
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in recipe.train.trackers:
        if name not in known:
            listed = ", ".join(sorted(known))
            raise RecipeError(f"train.trackers: got `{name}`; known: {listed}.{did_you_mean(name, known)}")
        if name not in installed and name in _PACKAGES:
            raise RecipeError(f"train.trackers: `{name}` is not installed. Run: pip install {_PACKAGES[name]}")


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """One run of each tracker that the recipe names, with the recipe as its configuration."""
    if not recipe.train.trackers:
        return
    options: dict[str, Any] = recipe.train.tracker_options
    accelerator.init_trackers(Path(recipe.output_dir).name, config={"recipe": dump_recipe(recipe)}, init_kwargs=options)


def use_cores(accelerator: Accelerator) -> None:
    """Give each process its share of the cores, where `accelerate launch` left it one thread.

    On a machine without GPU the launcher sets OMP_NUM_THREADS=1 unless the variable is set (seen in 1.15), so that a
    run takes one core whatever the machine has. Any other value is the user's and stays; so does 1 without the
    launcher.
    """
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ
    if accelerator.device.type != "cpu" or not launched or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Only Linux tells which cores the process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // here))


def _was_to_be_several() -> bool:
    """Whether accelerate's launcher of single processes (seen in 1.15) was given --num_processes above 1 on a CPU: it
    then names a meeting point for the processes, and starts one, without a word."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "MASTER_PORT" in os.environ
    return on_cpu and launched and "WORLD_SIZE" not in os.environ
