"""What `accelerate launch` started: device, processes, threads."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from lora_kit.errors import RecipeError
from lora_kit.recipe import Recipe
from lora_kit.training.processes.launcher import Sharding, take_sharding
from lora_kit.training.processes.sharding import check_sharding
from lora_kit.training.trackers import logging_folder


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
    sharding = take_sharding()
    if sharding is not None:
        check_sharding(recipe)
    # Processes wait for each other while the first one draws and measures: torch's own limit is ten minutes.
    wait = InitProcessGroupKwargs(timeout=timedelta(minutes=recipe.train.wait_minutes))
    accelerator = LaunchedAccelerator(
        mixed_precision=recipe.train.mixed_precision,
        kwargs_handlers=[wait],
        log_with=list(recipe.train.trackers) or None,
        project_dir=logging_folder(recipe),
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
