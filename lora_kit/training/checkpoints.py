"""Checkpoints: a folder that is whole or not there, and everything a resume needs in it.

`trainable.safetensors` and `optimizer.safetensors` hold tensors, `state.json` the rest. Nothing random is
saved: noise, timesteps, dropout and order derive from (seed, step, sample).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_kit.errors import TrainingError
from lora_kit.files import sync_folder, sync_tree

STEP_FOLDER = re.compile(r"step-(\d{6,})")


class Progress(NamedTuple):
    """Where a run stands."""

    step: int
    """Optimizer steps done."""
    plan: dict[str, Any]
    """The plan as JSON: a checkpoint fits only the plan it was made with."""
    base_losses: list[float]
    """Held-out losses of the untrained base."""
    data: str = ""
    """The training set's fingerprint."""


def checkpoint_name(step: int) -> str:
    """`step-000200`."""
    return f"step-{step:06d}"


def find_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints below `folder`, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("step-*") if (m := STEP_FOLDER.fullmatch(p.name))]
    return [path for _, path in sorted(found) if (path / "state.json").is_file()]


def save_checkpoint(
    folder: Path, progress: Progress, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Path:
    """Write `folder`/step-… under a temporary name, fsync every file, rename."""
    path = folder / checkpoint_name(progress.step)
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    optimizer_tensors, optimizer_rest = _flatten_optimizer(optimizer)
    save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, temporary / "trainable.safetensors")
    save_file(optimizer_tensors, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps({**progress._asdict(), "optimizer": optimizer_rest}))
    sync_tree(temporary)
    if path.exists():  # the same step again, after a resume: the same bits
        shutil.rmtree(path)
    temporary.rename(path)
    sync_folder(folder)
    return path


def load_checkpoint(
    path: Path, plan: dict[str, Any], tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Progress:
    """Copy a checkpoint into the trainable `tensors` and the optimizer, bit for bit.

    Raises TrainingError if it is damaged or was made with another plan.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        saved = load_file(path / "trainable.safetensors")
        moments = load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"{path} is not a whole checkpoint: {error}. Resume from an older one with train.resume=FOLDER, or "
            "remove it."
        ) from error
    if state["plan"] != plan:
        raise TrainingError(
            f"{path} was made with other targets than this recipe's. Put `targets` back, or begin a new run with "
            "another output_dir."
        )
    if saved.keys() != tensors.keys():
        raise TrainingError(f"{path} holds other tensors than this run trains (was train.ema_decay changed?).")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
    _restore_optimizer(optimizer, moments, state["optimizer"])
    return Progress(state["step"], state["plan"], state["base_losses"], state["data"])


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Leave the newest `keep` checkpoints of this run."""
    for path in find_checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def named_trainables(components: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Trainable parameters by dotted name, in module order."""
    return {
        f"{component}.{name}": parameter
        for component, module in components.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Per-parameter state as tensors named `<parameter index>.<key>`, and the plain numbers beside them.

    bitsandbytes nests its quantised moments one level deeper: `<parameter index>.<key>.<inner key>`.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = _stored(value)
            elif isinstance(value, dict):
                tensors |= {f"{index}.{key}.{inner}": _stored(tensor) for inner, tensor in value.items()}
            else:
                rest.setdefault(str(index), {})[key] = value
    return tensors, rest


def _stored(tensor: Tensor) -> Tensor:
    """A copy as safetensors takes it: on the CPU, contiguous, sharing memory with none."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, dict[str, Any]]
) -> None:
    """Inverse of _flatten_optimizer. Groups (rates, betas) stay the recipe's."""
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        index, key, *inner = name.split(".")
        values = state.setdefault(int(index), {})
        if inner:
            values.setdefault(key, {})[inner[0]] = tensor
            continue
        like = parameters[int(index)]
        # Moments lie in memory as their weight does (channels-last): the fused update walks both side by side.
        same_shape = tensor.shape == like.shape and tensor.dtype == like.dtype
        values[key] = torch.empty_like(like, requires_grad=False).copy_(tensor) if same_shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
