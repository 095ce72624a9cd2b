"""Strengths of injected adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from lora_kit.adapters.injection import require_adapter
from lora_kit.adapters.layers import activate
from lora_kit.adapters.record import adapter_names, record_of
from lora_kit.adapters.state import lora_layers
from lora_kit.errors import TargetError


def set_scales(components: Mapping[str, nn.Module], scales: Mapping[str, float]) -> None:
    """Make exactly the adapters of `scales` active, each at its strength; all others are off.

    An adapter at 0 is taken off the active list rather than multiplied by zero, so with none left the output is
    the base's bit for bit. What is trainable stays so. Raises TargetError, before anything is changed, for an
    unknown name, a scale that is not finite, or a `full` one other than 1 (its weights are the network's own).
    """
    for name, scale in scales.items():
        require_adapter(components, name)
        _check_scale(components, name, scale)
    for present in adapter_names(components):
        for layer in lora_layers(components, present).values():
            active = [name for name, scale in scales.items() if scale != 0 and name in layer.lora_A]
            for name in active:
                layer.set_scale(name, scales[name])
            activate(layer, active)


def _check_scale(components: Mapping[str, nn.Module], name: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise TargetError(f"the scale of adapter `{name}` is {scale}; it must be a finite number.")
    full = any(name in record_of(network).full for network in components.values())
    if full and scale != 1:
        raise TargetError(f"adapter `{name}` trained whole weights (`method: full`), so its scale is 1; got {scale}.")
