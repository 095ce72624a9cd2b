"""A model's networks by name, and the modules inside them by dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_kit.errors import TargetError

NETWORKS = ("unet", "text_encoder")
"""The components of a pipeline that adapters change."""

_OTHER_NAMES = {"text_encoder": "bert"}
"""What LDMTextToImagePipeline calls it."""

Model = Any
"""A diffusers pipeline, a `ModelBundle`, or a mapping such as {"unet": unet, "text_encoder": text_encoder}."""


def components_of(model: Model) -> dict[str, nn.Module]:
    """The networks of a pipeline, a bundle or a mapping, by the name that rules and files start with.

    Raises TargetError for anything else, and for a mapping that holds other things than networks.
    """
    if isinstance(model, Mapping):
        return _checked(model)
    offered = getattr(model, "components", None)
    if not isinstance(offered, Mapping):
        raise TargetError(
            f"got a {type(model).__name__}; allowed: a diffusers pipeline, a ModelBundle, or a mapping of networks "
            'such as {"unet": unet, "text_encoder": text_encoder}.'
        )
    names = {name: _OTHER_NAMES.get(name, name) if name not in offered else name for name in NETWORKS}
    found = {name: offered[own] for name, own in names.items() if isinstance(offered.get(own), nn.Module)}
    if not found:
        raise TargetError(f"this {type(model).__name__} has neither {' nor '.join(NETWORKS)}, which adapters change.")
    return found


def module_at(components: Mapping[str, nn.Module], name: str) -> nn.Module:
    """The module `unet.….to_q`, with whatever adapters are over it. Raises KeyError or AttributeError."""
    component, _, inner = name.partition(".")
    return components[component].get_submodule(inner)


def put_module(components: Mapping[str, nn.Module], name: str, module: nn.Module) -> None:
    """Set the module in its parent's place for it."""
    parent, _, child = name.rpartition(".")
    setattr(module_at(components, parent), child, module)


def _checked(components: Mapping[Any, Any]) -> dict[str, nn.Module]:
    found = {name: network for name, network in components.items() if isinstance(network, nn.Module)}
    if not found or len(found) != len(components):
        others = ", ".join(f"{name}: {type(one).__name__}" for name, one in components.items() if name not in found)
        raise TargetError(f"a mapping of networks may hold torch modules alone; got {others or 'an empty one'}.")
    return found
