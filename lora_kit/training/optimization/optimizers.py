"""Optimizer and rates, each from its own section."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_kit.errors import RecipeError, did_you_mean
from lora_kit.recipe import OptimizerSection, Recipe
from lora_kit.recipe.optimizer import OPTIMIZERS
from lora_kit.targeting import TargetPlan
from lora_kit.targeting.rates import module_rates
from lora_kit.training.optimization.one_rate import OneRateEach
from lora_kit.training.processes.sharding import is_sharded

_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def parameter_groups(
    plan: TargetPlan,
    trainable: Mapping[str, Sequence[nn.Parameter]],
    section: OptimizerSection,
    ups: Sequence[Any] = (),
) -> list[dict[str, Any]]:
    """One optimizer group per learning rate; `trainable` maps a target module's name to its parameters.

    ups: the up matrices among them, which `lr_ratio` is for. Each group keeps its peak rate as `peak_lr`;
    `set_learning_rate` scales from there.
    """
    rates = module_rates(plan, section)
    is_up = {id(parameter) for parameter in ups}
    groups: dict[float, dict[str, Any]] = {}
    for item in plan.targets:
        rate = rates[item.module.name]
        for parameter in trainable[item.module.name]:
            own = rate * (section.lr_ratio or 1.0) if id(parameter) in is_up else rate
            group = groups.setdefault(own, {"params": [], "lr": own, "peak_lr": own})
            group["params"].append(parameter)
    return list(groups.values())


def up_matrices(trainable: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """LoRA's, rsLoRA's and DoRA's up factors (B in Hu et al. 2021) among the trainable parameters by dotted name."""
    return [parameter for name, parameter in trainable.items() if ".lora_B." in name or name.endswith(".up")]


def check_optimizer(recipe: Recipe, device: torch.device) -> None:
    """Make the optimizer over one weight, so that whatever is wrong with it is told before anything is loaded.

    Raises RecipeError for a class or an argument that is not there, values that the class refuses, a package that is
    not installed, and a paged optimizer without CUDA.
    """
    if recipe.optimizer.name.rpartition(".")[2].lower().startswith("paged") and device.type != "cuda":
        plain = recipe.optimizer.name.removeprefix("paged_")
        raise RecipeError(
            f"optimizer.name: {recipe.optimizer.name} pages its state between GPU and CPU memory, which needs a CUDA "
            f"GPU; this run is on `{device.type}`. Use {plain if plain in OPTIMIZERS else 'adamw8bit or adamw'}."
        )
    weight = nn.Parameter(torch.zeros(2, 2))
    build_optimizer([{"params": [weight], "lr": recipe.optimizer.lr, "peak_lr": recipe.optimizer.lr}], recipe)


def build_optimizer(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, in training mode where it has modes. Raises RecipeError as above."""
    section = recipe.optimizer
    kind = optimizer_class(section.name)
    options = _options(kind, recipe)
    _check_arguments(kind, section)
    if kind is torch.optim.SGD and any(is_sharded(weight) for group in groups for weight in group["params"]):
        options["fused"] = False  # torch 2.13 has this update for whole tensors only

    def make(part: list[dict[str, Any]]) -> torch.optim.Optimizer:
        with contextlib.redirect_stdout(io.StringIO()):  # Prodigy prints; standard output is for results
            return kind(part, **options)

    try:
        # Prodigy takes one rate for all it holds.
        optimizer = OneRateEach(groups, make) if section.is_prodigy and len(groups) > 1 else make(groups)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"optimizer: {section.name} refuses {_shown(options)}: {error}") from error
    train_mode = getattr(optimizer, "train", None)
    if callable(train_mode):
        train_mode()
    return optimizer


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class that `optimizer.name` means. Raises RecipeError if it is not there or no torch optimizer."""
    place = OPTIMIZERS[name].place if name in OPTIMIZERS else name
    package, _, kind = place.rpartition(".")
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        top = package.partition(".")[0]
        command = f"pip install {top}" + (' (or "lora_kit[optimizers]")' if name in OPTIMIZERS else "")
        raise RecipeError(f"optimizer.name: {name} needs the package `{top}`: {error}. Run: {command}") from error
    found = getattr(module, kind, None)
    if found is None:
        names = [key for key, value in vars(module).items() if _is_optimizer(value)]
        raise RecipeError(f"optimizer.name: `{package}` has no {kind}.{did_you_mean(kind, names)}")
    if not _is_optimizer(found):
        raise RecipeError(f"optimizer.name: {name} is no torch.optim.Optimizer, so it cannot be stepped or saved.")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise RecipeError(
            f"optimizer.name: {name} evaluates the loss several times a step (its step needs a closure), which a "
            f"training run cannot give it. Use one of {', '.join(OPTIMIZERS)}."
        )
    return found


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group to `factor` × its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def _is_optimizer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer)


def _options(kind: type[torch.optim.Optimizer], recipe: Recipe) -> dict[str, Any]:
    """The class's arguments: what suits a rate set from outside, under what the recipe names."""
    given = recipe.optimizer.given()
    ours: dict[str, Any] = {}
    if kind in _FUSED and not given.keys() & {"foreach", "differentiable"}:
        ours = {"fused": True}
    if recipe.optimizer.name in ("adafactor", OPTIMIZERS["adafactor"].place):
        # Its own rate (relative_step) and a rate scaled by each weight's size would both undo the recipe's rates.
        ours = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    if recipe.optimizer.is_prodigy:
        ours = {"safeguard_warmup": recipe.schedule.warmup_steps > 0}
    return ours | given


def _check_arguments(kind: type[torch.optim.Optimizer], section: OptimizerSection) -> None:
    parameters = inspect.signature(kind).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    allowed = [name for name in parameters if name not in ("self", "params", "lr")]
    fields = [key for key in ("betas", "weight_decay", "eps") if getattr(section, key) is not None]
    unknown = [f"optimizer.{key}" for key in fields if key not in allowed]
    unknown += [f"optimizer.args.{key}" for key in section.args if key not in allowed]
    if unknown:
        lines = [f"{path}: unknown.{did_you_mean(path.rpartition('.')[2], allowed)}" for path in unknown]
        raise RecipeError(
            "\n  ".join([f"optimizer: {section.name} has no such arguments:", *lines, f"allowed: {', '.join(allowed)}"])
        )


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())
