"""Checkpoints: a folder that is whole or not there, and everything a resume needs in it.

`trainable.safetensors`, `ema.safetensors` and `optimizer.safetensors` hold tensors, `state.json` the rest, and
`manifest.json` every file's size and sha256. Nothing random is saved: noise, timesteps, dropout and order derive from
(seed, step, sample), so that the number of steps done is the position in the data, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_kit.errors import TrainingError
from lora_kit.training.checkpoints.folders import damage, put_in_place, temporary_folder, write_manifest
from lora_kit.training.optimization.ema import WeightAverage
from lora_kit.training.optimization.optimizer_state import flatten_optimizer, restore_optimizer
from lora_kit.training.processes.sharding import placed, whole


@dataclass(frozen=True)
class Progress:
    """Where a run stands, but for its tensors."""

    step: int
    """Optimizer steps done; all of them are whole, a step that was cut off is done again."""
    plan: dict[str, Any]
    """The plan as JSON: a checkpoint fits only the plan it was made with."""
    base_losses: list[list[float]]
    """Held-out losses of the untrained base, of each picture at each timestep."""
    data: str = ""
    """The training set's fingerprint."""
    base_hash: str = ""
    """Of the base that adapters were trained on."""
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    """The recipe as JSON, for telling what changed."""
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """Validations done: {"step": …, and its figures if there is a held-out set}."""
    train_base_losses: list[list[float]] = field(default_factory=list[list[float]])
    """As `base_losses`, of the training subset."""
    best_losses: list[list[float]] = field(default_factory=list[list[float]])
    """As `base_losses`, of the weights of the lowest held-out loss."""
    last_losses: list[list[float]] = field(default_factory=list[list[float]])
    """As `base_losses`, of the last validation's weights."""
    measured_with: str = ""
    """What the losses were measured on, and how: a hash."""
    skipped_in_row: int = 0
    """Steps just before this that were left out as not finite (`train.non_finite: skip`)."""
    rewarm: tuple[int, int] = (0, 0)
    """The step at which `schedule.rewarm_steps` began, and how many."""

    @property
    def best(self) -> dict[str, float] | None:
        """The validation with the lowest held-out loss, the first of equals."""
        measured = [entry for entry in self.history if "held_out_loss" in entry]
        return min(measured, key=lambda entry: entry["held_out_loss"], default=None)

    @property
    def validated(self) -> bool:
        """Whether the validation of this very step is done."""
        return any(entry["step"] == self.step for entry in self.history)


class State(NamedTuple):
    """All of a run that changes in a step and holds tensors."""

    trainable: Mapping[str, Tensor]
    """fp32, by dotted name."""
    average: WeightAverage
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    """fp16's."""


def checkpoint_name(step: int) -> str:
    """`step-000200`."""
    return f"step-{step:06d}"


def save_checkpoint(folder: Path, progress: Progress, state: State, writes: bool = True) -> Path:
    """Write `folder`/step-… under a temporary name, fsync every file, rename. If it fails, nothing is left of it.

    Where tensors are sharded every process must call this, and all but the one that writes say `writes=False`.
    """
    trainable = _on_cpu(state.trainable, writes)
    averages = _on_cpu(state.average.tensors(), writes)
    optimizer_tensors, optimizer_document = flatten_optimizer(state.optimizer, writes)
    document = asdict(progress) | {
        "optimizer": optimizer_document,
        "ema_updates": state.average.updates,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
    }
    path = folder / checkpoint_name(progress.step)
    if not writes:
        return path
    with temporary_folder(path) as temporary:
        save_file(trainable, temporary / "trainable.safetensors")
        save_file(optimizer_tensors, temporary / "optimizer.safetensors")
        if state.average.is_moving:
            save_file(averages, temporary / "ema.safetensors")
        (temporary / "state.json").write_text(json.dumps(document), encoding="utf-8")
        write_manifest(temporary)
        put_in_place(temporary, path)
    return path


def load_checkpoint(path: Path, plan: dict[str, Any], base_hash: str, state: State) -> Progress:
    """Copy a checkpoint into `state`, bit for bit.

    Raises TrainingError if it is damaged, or was made with another plan, base or optimizer.
    """
    reason = damage(path)
    if reason:
        raise damaged(path, reason)
    try:
        document = json.loads((path / "state.json").read_text(encoding="utf-8"))
        saved = load_file(path / "trainable.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        averages = load_file(path / "ema.safetensors") if (path / "ema.safetensors").exists() else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(path, str(error)) from error
    _check_fits(path, document, plan, base_hash)
    if averages.keys() != state.average.tensors().keys():
        raise TrainingError(f"{path}: train.ema_decay was set or removed since. Put it back, or begin a new run.")
    _copy(saved, state.trainable)
    _copy(averages, state.average.tensors())
    state.average.updates = document["ema_updates"]
    restore_optimizer(state.optimizer, moments, document["optimizer"])
    if state.scaler is not None and document["scaler"]:
        state.scaler.load_state_dict(document["scaler"])
    known: dict[str, Any] = {entry.name: document[entry.name] for entry in fields(Progress) if entry.name in document}
    known["rewarm"] = tuple(known["rewarm"])
    return Progress(**known)


def losses_known(path: Path, measured_with: str) -> tuple[list[list[float]], list[list[float]]] | None:
    """`base_losses` and `train_base_losses` of a whole checkpoint, if they were measured in this way."""
    document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if document.get("measured_with", "") != measured_with:
        return None
    return document["base_losses"], document.get("train_base_losses", [])


def damaged(path: Path, reason: str) -> TrainingError:
    """A checkpoint that was named, and is not whole."""
    return TrainingError(
        f"{path} is not a whole checkpoint: {reason}. Resume from the newest whole one with train.resume=latest, or "
        "name another."
    )


def named_trainables(components: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Trainable parameters by dotted name, in module order."""
    return {
        f"{component}.{name}": parameter
        for component, module in components.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _on_cpu(tensors: Mapping[str, Tensor], keeps: bool) -> dict[str, Tensor]:
    """The tensors whole, for a file; nothing if this process keeps none."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        made = whole(tensor.detach())  # in every process, whether or not it keeps it
        if keeps:
            found[name] = made.contiguous().cpu()
    return found


def _check_fits(path: Path, document: dict[str, Any], plan: dict[str, Any], base_hash: str) -> None:
    if document["plan"] != plan:
        raise TrainingError(
            f"{path} was made with other targets or tokens than this recipe's. Put `targets` and `tokens` back, or "
            "begin a new run with another output_dir."
        )
    if document["base_hash"] != base_hash:
        raise TrainingError(
            f"{path} was trained on another base than this recipe's. Put `model` back, or begin a new run with "
            "another output_dir."
        )


def _copy(saved: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(placed(saved[name], tensor))
