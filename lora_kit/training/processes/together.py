"""What the processes of a launch decide together, and what is said when one of them is lost."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from lora_kit.errors import TrainingError
from lora_kit.recipe import Recipe
from lora_kit.training.checkpoints.folders import damage
from lora_kit.training.folder import checkpoint_to_resume

_T = TypeVar("_T")
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket", "tcpstore", "timed out")


def agreed(accelerator: Accelerator, value: _T) -> _T:
    """The main process's value, in every process. All must ask."""
    if accelerator.num_processes == 1:
        return value
    told: list[Any] = [value]
    broadcast_object_list(told)
    return told[0]


def of_all(accelerator: Accelerator, value: Any) -> list[Any]:
    """Every process's value, by rank. All must ask."""
    return [value] if accelerator.num_processes == 1 else gather_object([value])


def require_same(accelerator: Accelerator, facts: dict[str, str]) -> None:
    """Raise TrainingError in every process, if one knows something else than the main process under some name."""
    everyone = of_all(accelerator, facts)
    problems = [
        f"{name}: process {rank} has another than process 0"
        for rank, theirs in enumerate(everyone)
        for name in facts
        if theirs[name] != everyone[0][name]
    ]
    if problems:
        listed = "\n  ".join(problems[:10])
        raise TrainingError(
            f"The processes of this launch do not see the same:\n  {listed}\nGive every machine the same recipe, base "
            "and pictures: a shared disk, or equal copies under equal paths."
        )


def common_checkpoint(accelerator: Accelerator, recipe: Recipe) -> Path | None:
    """`checkpoint_to_resume` of the main process, in every process. Raises as that does, and TrainingError in all of
    them if one does not have it whole."""
    found = agreed(accelerator, checkpoint_to_resume(recipe) if accelerator.is_main_process else None)
    if found is None or accelerator.num_processes == 1:
        return found
    reasons = of_all(accelerator, "" if accelerator.is_main_process else damage(found))
    problems = [f"process {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
    if problems:
        listed = "\n  ".join(problems[:10])
        raise TrainingError(
            f"The run goes on from {found}, which not every process can read:\n  {listed}\nPut output_dir on a disk "
            "that all machines share, or copy that folder to the same path on each."
        )
    return found


@contextmanager
def lost_process_told(accelerator: Accelerator, last_whole: Callable[[], str]) -> Generator[None]:
    """Turn what torch raises when another process is gone into a message; last_whole: where to go on from."""
    try:
        yield
    except RuntimeError as error:  # gloo raises no narrower class
        if accelerator.num_processes == 1 or not _is_lost(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise TrainingError(
            "Another process of this launch ended, or did not answer within train.wait_minutes. Its own message, or "
            f"the launcher's, says which rank and why. {last_whole()}(What torch said: {first[:200]})"
        ) from error


def _is_lost(error: RuntimeError) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    said = str(error).lower()
    return any(sign in said for sign in _LOST)
