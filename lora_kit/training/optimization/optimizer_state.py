"""Any torch optimizer's state ↔ tensors by name and plain JSON, bit for bit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lora_kit.errors import TrainingError
from lora_kit.training.optimization.one_rate import OneRateEach
from lora_kit.training.processes.sharding import placed, whole

_RECIPES_OWN = {"params", "lr", "peak_lr", "initial_lr"}


def flatten_optimizer(optimizer: torch.optim.Optimizer, keeps: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state's tensors as `<parameter index>.<key>`, and a JSON document that says where each belongs.

    Of the parameter groups, what is no argument of the optimizer's class is state too: Prodigy keeps its estimate
    there, the schedule-free ones their weights' sum. Arguments and rates stay the recipe's.

    keeps: False in a process that only takes part in gathering sharded tensors; it gets none.

    Raises TrainingError for a state that is neither numbers, text nor tensors.
    """
    tensors: dict[str, Tensor] = {} if keeps else _Nothing()
    state = {
        str(index): _encode(value, str(index), tensors) for index, value in optimizer.state_dict()["state"].items()
    }
    groups = [_encode(_group_state(optimizer, group), f"group{i}", tensors) for i, group in _groups(optimizer)]
    return tensors, {"class": class_name(optimizer), "state": state, "groups": groups}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> None:
    """Inverse of `flatten_optimizer`. Raises TrainingError if the state is another optimizer's or of other groups."""
    if document["class"] != class_name(optimizer):
        raise TrainingError(
            f"The checkpoint's optimizer is {document['class']}, the recipe's {class_name(optimizer)}: one's state is "
            "nothing to the other. Put `optimizer.name` back, or begin a new run with another output_dir."
        )
    if len(document["groups"]) != len(optimizer.param_groups):
        raise TrainingError(
            f"The checkpoint's optimizer has {len(document['groups'])} different learning rates, the recipe "
            f"{len(optimizer.param_groups)}: put the rates (`lr`, `text_encoder_lr`, `token_lr`, `lr_ratio`, "
            "`lr_scale`) back in the same places, or begin a new run with another output_dir."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {int(index): _decode(value, tensors) for index, value in document["state"].items()}
    state = {index: _laid_out(values, parameters[index]) for index, values in state.items()}
    groups = [
        group | _decode(saved, tensors)
        for group, saved in zip(optimizer.state_dict()["param_groups"], document["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _undo_casts(optimizer, parameters, state)


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """`module.Class`, by which a checkpoint knows its optimizer."""
    kind = optimizer.kind if isinstance(optimizer, OneRateEach) else type(optimizer)
    return f"{kind.__module__}.{kind.__qualname__}"


class _Nothing(dict[str, Tensor]):
    """Forgets what it is given."""

    def __setitem__(self, key: str, value: Tensor) -> None:
        pass


def _groups(optimizer: torch.optim.Optimizer) -> enumerate[dict[str, Any]]:
    return enumerate(optimizer.param_groups)


def _group_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    kind = optimizer.kind if isinstance(optimizer, OneRateEach) else type(optimizer)
    arguments = {*inspect.signature(kind).parameters, *_RECIPES_OWN}
    return {key: value for key, value in group.items() if key not in arguments}


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of `value`; its tensors go to `tensors`, under names that begin with `name`."""
    if isinstance(value, Tensor):
        # safetensors takes them on the CPU, contiguous, sharing memory with none.
        tensors[name] = whole(value.detach()).cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return {"map": [[_encode(key, name, tensors), _encode(part, f"{name}.{key}", tensors)] for key, part in items]}
    if isinstance(value, list | tuple):
        parts = [_encode(part, f"{name}.{i}", tensors) for i, part in enumerate(cast("list[Any]", value))]
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TrainingError(
        f"The optimizer keeps a {type(value).__name__} at {name}, which a checkpoint cannot hold. Use another "
        "`optimizer.name`."
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = cast("dict[str, Any]", value).items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "map":
        return {_decode(key, tensors): _decode(part, tensors) for key, part in inner}
    parts = [_decode(part, tensors) for part in inner]
    return tuple(parts) if kind == "tuple" else parts


def _laid_out(values: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """Moments lie in memory as their weight does (channels-last): the fused update walks both side by side."""
    laid = dict(values)
    for key, value in values.items():
        if isinstance(value, Tensor) and value.shape == like.shape and value.dtype == like.dtype:
            laid[key] = torch.empty_like(like, requires_grad=False).copy_(placed(value, like))
    return laid


def _undo_casts(optimizer: torch.optim.Optimizer, parameters: list[Tensor], saved: dict[int, dict[str, Any]]) -> None:
    """torch's load_state_dict turns every tensor into its parameter's dtype, whole numbers too."""
    for index, values in saved.items():
        own = optimizer.state[parameters[index]]
        for key, value in values.items():
            if isinstance(value, Tensor) and key in own and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device)
