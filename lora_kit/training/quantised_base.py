"""The run's frozen base in few bits (`model.quantize`), and what that costs and saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from lora_kit.adapters.layers import live_layer, stacked
from lora_kit.adapters.places import module_at, put_module
from lora_kit.allocator import pages_of_their_own
from lora_kit.models import ModelBundle
from lora_kit.models.mapped import forget
from lora_kit.models.quantise import WeightError, error_of, held_bytes, quantised
from lora_kit.recipe import Recipe
from lora_kit.targeting.quantised import Quantised
from lora_kit.training.conditions import Conditions
from lora_kit.training.objective import build_objective
from lora_kit.training.prepared import PreparedData, place_networks
from lora_kit.training.validation.held_out import MeasuredSet, draw_losses
from lora_kit.training.validation.intervals import interval


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
    exact_losses: Sequence[float] = ()
    """Of the held-out pictures, by the base before it was quantised; none were measured: empty."""

    def line(self) -> str:
        """For the user, at the start."""
        whole = self.whole_before - self.before + self.after
        parts = [f"{name} {error.relative:.2%}" for name, error in self.errors.items()]
        return (
            f"base in {self.kind}: {self.layers} linear layers of {_mb(self.before)} now hold {_mb(self.after)}; "
            f"frozen weights of {', '.join(self.errors)} {_mb(self.whole_before)} -> {_mb(whole)}. "
            f"Relative rms error of the quantised weights: {', '.join(parts)}."
        )


def means(losses: Sequence[Sequence[float]]) -> list[float]:
    """Each picture's mean over its timesteps."""
    return [sum(own) / len(own) for own in losses]


def loss_line(quantised: QuantisedBase | None, losses: Sequence[Sequence[float]]) -> list[str]:
    """What quantising the base did to its held-out loss, for the user. losses: of the quantised base's held-out
    pictures, at each timestep."""
    if quantised is None or not quantised.exact_losses:
        return []
    now, before = means(losses), quantised.exact_losses
    pair = interval([one - other for one, other in zip(now, before, strict=True)])
    reach = (pair.high - pair.low) / 2
    return [
        f"held-out loss of the base: {sum(before) / len(before):.4f} as it is, {sum(now) / len(now):.4f} in "
        f"{quantised.kind}, paired difference {pair.mean:+.5f} ± {reach:.5f} (95 %)."
    ]


def exact_losses(
    recipe: Recipe, bundle: ModelBundle, data: PreparedData, trains_text: bool, accelerator: Accelerator
) -> list[float]:
    """Each held-out picture's loss by the base as it is now; empty without such pictures.

    The whole base visits the device for it, forward only, and is on the CPU afterwards.
    """
    if data.held_out is None:
        return []
    section = recipe.validation
    records = tuple(range(data.held_out.record_count))
    held_out = MeasuredSet(data.held_out, records, section.held_out_timesteps, section.seed)
    place_networks(bundle, data, trains_text, accelerator.device)
    conditions = Conditions(bundle, trains_text, recipe.data.captions.long, data.texts)
    with accelerator.autocast():
        losses = draw_losses(held_out, build_objective(recipe.objective, bundle), bundle, conditions)
    for network in bundle.components.values():
        network.to("cpu")
    return means(losses.tolist())


@pages_of_their_own()
def quantise_base(
    components: Mapping[str, nn.Module], plan: Quantised, device: torch.device, exact: Sequence[float] = ()
) -> QuantisedBase:
    """Put quantised layers, on `device`, in the place of the plan's; adapters' layers over them stay.

    One layer is held twice at a time. What is not quantised stays where it is. exact: see `exact_losses`.
    """
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
        assert isinstance(base, nn.Linear), f"{module.name} is a {type(base).__name__}"
        made = quantised(base, plan.kind, device)
        errors[module.component] += error_of(made, base.weight)
        before += base.weight.numel() * base.weight.element_size()
        after += held_bytes([made])
        put_module(components, module.name, stacked(lora, delta, made))
        forget(base)  # its file stays mapped as long as any other weight of it lives
    return QuantisedBase(plan.kind, len(plan.modules), before, after, whole, errors, exact)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
