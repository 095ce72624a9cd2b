"""Strengths of live adapters, as a whole and per block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from lora_kit.adapters.injection import require_adapter
from lora_kit.adapters.layers import LiveLayer, activate, live_layers
from lora_kit.adapters.places import Model, components_of
from lora_kit.adapters.record import adapter_names, record_of, require_unfused
from lora_kit.errors import RecipeError, TargetError
from lora_kit.targeting import module_tree
from lora_kit.targeting.block_scales import check_depth, module_scales


class Strength(NamedTuple):
    """How strongly an adapter acts on each module: `scale` × the number of the last of `rules` that matches it."""

    scale: float = 1.0
    rules: tuple[str, ...] = ()
    """`glob=number`, or sd-webui's 17 or 26 block weights: see `lora_kit.targeting.block_scales.module_scales`."""


Scale = float | str | Mapping[str, float] | Strength
"""A strength; one rule; globs and their numbers, in order; or all of it."""


def set_scale(model: Model, scales: Mapping[str, Scale]) -> None:
    """Make exactly the adapters of `scales` act, each at its strength; all others are off.

        set_scale(pipe, {"style": 0.8, "face": -0.5})
        set_scale(pipe, {"style": {"unet.**": 1.0, "unet.up_blocks.**": 0.6}})     # the last match decides
        set_scale(pipe, {"style": "1,0,0,0,0,0,0,0,0.5,1,1,1,1,1,1,1,1"})          # sd-webui's 17 or 26 numbers
        set_scale(pipe, {"style": Strength(0.8, ("unet.mid_block.**=0",))})        # 0.8, but 0 in the middle

    model: a diffusers pipeline, a `ModelBundle`, or networks by name. Globs are those of the targeting rules, `re:`
    included; a module that none matches has strength 1. An adapter at 0 is taken off rather than multiplied by zero:
    where all are, the output is the base's bit for bit. What is trainable stays so.

    Raises, before anything is changed, TargetError for an unknown adapter, a strength that is not finite, a `full`
    one other than 1 (its weights are the network's own), or fused adapters; RecipeError for a rule that cannot be
    read or matches nothing.
    """
    networks = components_of(model)
    require_unfused(networks)
    modules, everything = adapted_modules(networks), [module.name for module in module_tree(networks)]
    problems: list[str] = []
    wanted: dict[str, dict[str, float]] = {}
    for name, scale in scales.items():
        require_adapter(networks, name)
        try:
            strength = _strength(scale)
            check_depth(everything, strength.rules)
            wanted[name] = _resolved(name, modules[name], strength)
        except RecipeError as error:
            problems.append(f"adapter `{name}`: {error}")
    if problems:
        raise RecipeError("\n".join(problems))
    apply_scales(networks, wanted)


def apply_scales(components: Mapping[str, nn.Module], scales: Mapping[str, Mapping[str, float]]) -> None:
    """As `set_scale`, with the strengths worked out already: adapter → module → strength.

    Raises TargetError, before anything is changed.
    """
    require_unfused(components)
    for name, strengths in scales.items():
        require_adapter(components, name)
        for scale in strengths.values():
            _check_scale(components, name, scale)
    own = adapter_names(components)
    for module, layer in live_layers(components).items():
        _set(layer, own, {name: strengths[module] for name, strengths in scales.items() if name in layer.adapters})


def adapted_modules(components: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Adapter → the modules it changes, in module order; adapters in the order of injection."""
    found: dict[str, list[str]] = {name: [] for name in adapter_names(components)}
    for module, layer in live_layers(components).items():
        for name in layer.adapters:
            found.setdefault(name, []).append(module)
    for component, network in components.items():
        for name, parameters in record_of(network).full.items():
            owners = [f"{component}.{parameter.rpartition('.')[0]}" for parameter in parameters]
            found[name] += [owner for owner in dict.fromkeys(owners) if owner not in found[name]]
    return found


def _strength(scale: Scale) -> Strength:
    if isinstance(scale, Strength):
        return scale
    if isinstance(scale, str):
        return Strength(rules=(scale,))
    if isinstance(scale, Mapping):
        return Strength(rules=tuple(f"{glob}={float(number)!r}" for glob, number in scale.items()))
    return Strength(scale)


def _resolved(name: str, modules: list[str], strength: Strength) -> dict[str, float]:
    if not math.isfinite(strength.scale):
        raise TargetError(f"the scale of adapter `{name}` is {strength.scale}; it must be a finite number.")
    return module_scales(modules, strength.scale, strength.rules)


def _set(layer: LiveLayer, own: list[str], scales: Mapping[str, float]) -> None:
    """Strengths of one module; a name of `own` that has none, or 0, is off. PEFT adapters of others stay."""
    lora, delta, _ = layer
    if lora is not None:
        active = [name for name, scale in scales.items() if scale != 0 and name in lora.lora_A]
        for name in active:
            lora.set_scale(name, scales[name])
        foreign = [name for name in lora.active_adapters if name not in own]
        activate(lora, [*foreign, *active])
    if delta is not None:
        delta.set_scales({name: scale for name, scale in scales.items() if name in delta.updates})


def _check_scale(components: Mapping[str, nn.Module], name: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise TargetError(f"the scale of adapter `{name}` is {scale}; it must be a finite number.")
    full = any(name in record_of(network).full for network in components.values())
    if full and scale != 1:
        raise TargetError(f"adapter `{name}` trained whole weights (`method: full`), so its scale is 1; got {scale}.")
