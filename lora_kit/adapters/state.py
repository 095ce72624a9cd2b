"""The neutral form of an adapter: module name → the update it describes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora_kit.adapters.updates import LoraUpdate, Update
from lora_kit.errors import AdapterFileError
from lora_kit.targeting import ModuleInfo, module_tree

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from lora_kit.targeting import TargetPlan


class AdapterState(NamedTuple):
    """All updates of one adapter file, under dotted names that start with the component (`unet.…`)."""

    updates: dict[str, Update]
    metadata: dict[str, str]
    """The file's header: strings only."""
    embeddings: Mapping[str, Tensor] = MappingProxyType({})
    """Learned tokens that came with the file: what a prompt says → its vectors [width] or [n, width]."""


def weight_modules(components: Mapping[str, nn.Module]) -> dict[str, ModuleInfo]:
    """Every linear and convolution by dotted name, as if nothing were injected (the meta device will do)."""
    return {module.name: module for module in module_tree(components) if module.kind != "other"}


def adaptable_modules(components: Mapping[str, nn.Module]) -> dict[str, ModuleInfo]:
    """Every module with a weight by dotted name, norms too, as if nothing were injected: what a file may change."""
    return {module.name: module for module in module_tree(components)}


def lora_layers(components: Mapping[str, nn.Module], adapter_name: str) -> dict[str, LoraLayer]:
    """The injected layers that hold `adapter_name`, by dotted name, in the module tree's order."""
    from peft.tuners.lora import LoraLayer  # here: PEFT takes seconds to import, and files need none of it

    return {
        f"{component}.{inner}": module
        for component, network in components.items()
        for inner, module in network.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def adapter_state(components: Mapping[str, nn.Module], adapter_name: str) -> dict[str, Update]:
    """The updates of an injected adapter that trains as fp32 copies on the CPU, in module order; empty if there is
    none of that name."""
    from lora_kit.adapters.layers import live_layers  # here, as above
    from lora_kit.adapters.trained_parts import TrainedParts

    found: dict[str, Update] = {}
    for name, (lora, delta, _) in live_layers(components).items():
        if lora is not None and adapter_name in lora.lora_A:
            down, up = (_copy(side[adapter_name].weight) for side in (lora.lora_A, lora.lora_B))
            found[name] = LoraUpdate(down, up, float(lora.lora_alpha[adapter_name]))
        elif delta is not None and adapter_name in delta.trained:
            found[name] = cast(TrainedParts, delta.trained[adapter_name]).copied()
    return found


def plain_lora(updates: Mapping[str, Update]) -> dict[str, LoraUpdate]:
    """The updates, all of which must be pairs of factors and nothing more: what PEFT's LoRA layer holds.

    Raises AdapterFileError naming the methods that are not.
    """
    plain = {name: update for name, update in updates.items() if is_plain_lora(update)}
    others = sorted({update.method for name, update in updates.items() if name not in plain})
    if others:
        raise AdapterFileError(
            f"{len(updates) - len(plain)} modules hold more than a plain LoRA's two factors ({', '.join(others)}); "
            "only plain LoRA can be injected as LoRA layers"
        )
    return {name: update for name, update in plain.items() if isinstance(update, LoraUpdate)}


def is_plain_lora(update: Update) -> bool:
    """Whether the update is two factors: no Tucker core, no magnitude, no bias."""
    return isinstance(update, LoraUpdate) and update.parts().keys() == {"down", "up"}


def _copy(weight: Tensor | nn.Module) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight.detach().to("cpu", torch.float32, copy=True).contiguous()


def plan_for(components: Mapping[str, nn.Module], updates: Mapping[str, LoraUpdate]) -> TargetPlan:
    """The plan that makes room for `updates`: their modules, ranks and alphas, no rules, no dropout.

    Raises AdapterFileError naming every module that the model lacks.
    """
    from lora_kit.targeting import Target, TargetPlan  # here: plans bring in pydantic, which files do without

    modules = weight_modules(components)
    missing = sorted(set(updates) - set(modules))
    if missing:
        raise AdapterFileError(f"the model has no linear or convolution named {', '.join(missing)}")
    targets = tuple(
        Target(module, -1, "lora", updates[name].down.shape[0], updates[name].alpha, 0.0, 1.0)
        for name, module in modules.items()
        if name in updates
    )
    base = {name: sum(weight.numel() for weight in network.parameters()) for name, network in components.items()}
    return TargetPlan(targets, (), base)
