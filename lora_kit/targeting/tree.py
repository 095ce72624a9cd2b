"""Networks → the modules that rules can pick from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lora_kit.targeting.modules import ModuleInfo

if TYPE_CHECKING:
    from torch import nn


_UNCALLED = {"LDMBertModel": ("to_logits",)}
"""Class → its modules that no forward pass goes through, so that no rule can pick them: LDMBert's head over words."""


def module_tree(components: Mapping[str, nn.Module]) -> list[ModuleInfo]:
    """Every module with parameters of its own, in module order, under dotted names that start with the component.

    Works on the meta device. Layers that already carry PEFT adapters appear as if nothing were injected.
    """
    return [info for name, network in components.items() for info in _modules(name, network)]


def _modules(name: str, module: nn.Module) -> Iterator[ModuleInfo]:
    adapted = getattr(module, "base_layer", None)  # PEFT's name for the layer it wraps
    if adapted is not None:
        yield from _modules(name, adapted)
        return
    own = list(module.parameters(recurse=False))
    if own:
        weight = getattr(module, "weight", own[0])
        yield ModuleInfo(name, _kind(module), tuple(weight.shape), sum(parameter.numel() for parameter in own))
    uncalled = _UNCALLED.get(type(module).__name__, ())
    for child_name, child in module.named_children():
        if child_name in uncalled:
            continue
        yield from _modules(f"{name}.{child_name}", child)


def _kind(module: nn.Module) -> str:
    """`conv` is a Conv2d that LoRA can express: in a grouped one up · down is no update of the weight, and PEFT
    leaves dilation and other paddings than zeros out."""
    from torch import nn  # here, so that targeting itself starts without torch

    if isinstance(module, nn.Linear):
        return "linear"
    if not isinstance(module, nn.Conv2d):
        return "other"
    plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    return "conv" if plain else "other"
