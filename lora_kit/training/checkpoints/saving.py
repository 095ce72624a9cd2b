"""When and how a run's checkpoints are written, and what is said of the last one."""

from __future__ import annotations

import signal
from functools import partial

from lora_kit.errors import LoraKitError
from lora_kit.training.checkpoints.disk import full_disk_told
from lora_kit.training.checkpoints.folders import mark_best, newest_whole, remove_old
from lora_kit.training.checkpoints.resume import state_of
from lora_kit.training.checkpoints.state import Progress, checkpoint_name, save_checkpoint
from lora_kit.training.folder import RunFolder
from lora_kit.training.objects import Run
from lora_kit.training.processes.shares import takes_part
from lora_kit.training.processes.signals import InterruptedRunError


def is_best(run: Run, progress: Progress) -> bool:
    """Whether the weights of this step are the best so far, and are to be kept."""
    best = progress.best
    return run.recipe.save.best and best is not None and best["step"] == progress.step > 0


def save_now(run: Run, folder: RunFolder, progress: Progress) -> None:
    """Write the step's checkpoint, while every process waits."""
    if takes_part(run):
        write_checkpoint(run, folder, progress)
    run.accelerator.wait_for_everyone()


def write_checkpoint(run: Run, folder: RunFolder, progress: Progress) -> None:
    """Write the step's checkpoint and remove old ones, in a process that takes part in it."""
    path = folder.checkpoints / checkpoint_name(progress.step)
    with full_disk_told(path, partial(last_whole, folder)):
        writes = run.accelerator.is_main_process
        save_checkpoint(folder.checkpoints, progress, state_of(run), writes)
        if not writes:
            return
        link_best(run, folder, progress)
        remove_old(folder.checkpoints, progress.step, run.recipe.save.keep)


def link_best(run: Run, folder: RunFolder, progress: Progress) -> None:
    """Let checkpoints/best lead to the checkpoint of the lowest held-out loss that there is."""
    if not (run.recipe.save.best and run.accelerator.is_main_process and progress.step > 0):
        return
    best = progress.best
    name = checkpoint_name(int(best["step"])) if best else None
    there = name is not None and (folder.checkpoints / name).is_dir()
    mark_best(folder.checkpoints, name if there else None)


def interrupted(folder: RunFolder, step: int, number: int | None) -> LoraKitError:
    """What to raise after a signal, when the step is saved."""
    number = number or signal.SIGTERM  # another process got it
    where = folder.checkpoints / checkpoint_name(step)
    return InterruptedRunError(
        f"Stopped by {signal.Signals(number).name} after step {step}; saved {where}. Go on with train.resume=latest.",
        number,
    )


def last_whole(folder: RunFolder) -> str:
    """A sentence on the newest whole checkpoint."""
    found = newest_whole(folder.checkpoints)
    if found is None:
        return "There is no checkpoint yet. "
    return f"Last good checkpoint: {found}; go on from it with train.resume=latest. "
