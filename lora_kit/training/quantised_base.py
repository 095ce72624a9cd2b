"""The run's frozen base in few bits (`model.quantize`), and what that costs and saves."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lora_kit.adapters.layers import live_layer, stacked
from lora_kit.adapters.places import module_at, put_module
from lora_kit.models import ModelBundle
from lora_kit.models.quantise import WeightError, error_of, held_bytes, quantised
from lora_kit.targeting.quantised import Quantised


class QuantisedBase(NamedTuple):
    """What quantising did."""

    kind: str
    layers: int
    before: int
    """Bytes of the weights that were quantised."""
    after: int
    """Bytes of what holds them now, scales and tables too."""
    whole_before: int
    """Bytes of all of the networks' frozen weights."""
    errors: dict[str, WeightError]
    """Of each network."""

    def line(self) -> str:
        """For the user, at the start."""
        whole = self.whole_before - self.before + self.after
        parts = [f"{name} {error.relative:.2%}" for name, error in self.errors.items()]
        return (
            f"base in {self.kind}: {self.layers} linear layers of {_mb(self.before)} now hold {_mb(self.after)}; "
            f"frozen weights of {', '.join(self.errors)} {_mb(self.whole_before)} -> {_mb(whole)}. "
            f"Relative rms error of the quantised weights: {', '.join(parts)}."
        )


def quantise_base(bundle: ModelBundle, plan: Quantised, device: torch.device) -> QuantisedBase:
    """Put quantised layers, on `device`, in the place of the plan's; adapters' layers over them stay.

    One layer is held twice at a time. What is not quantised stays where it is.
    """
    components = bundle.components
    names = list(dict.fromkeys(module.component for module in plan.modules))
    whole = sum(
        weight.numel() * weight.element_size()
        for name in names
        for weight in components[name].parameters()
        if not weight.requires_grad
    )
    errors = {name: WeightError(0.0, 0.0) for name in names}
    before = after = 0
    for module in plan.modules:
        lora, delta, base = live_layer(module_at(components, module.name))
        assert isinstance(base, torch.nn.Linear), f"{module.name} is a {type(base).__name__}"
        made = quantised(base, plan.kind, device)
        errors[module.component] += error_of(made, base.weight)
        before += base.weight.numel() * base.weight.element_size()
        after += held_bytes([made])
        put_module(components, module.name, stacked(lora, delta, made))
    return QuantisedBase(plan.kind, len(plan.modules), before, after, whole, errors)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
