"""Put a plan's layers into the networks, and take them out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_kit.adapters.delta_layer import DeltaLayer
from lora_kit.adapters.group_norms import with_gradient
from lora_kit.adapters.layers import LiveLayer, activate, base_layer, live_layer, live_layers, stacked, with_adapter
from lora_kit.adapters.places import Model, components_of, module_at, put_module
from lora_kit.adapters.record import adapter_names, forget, record_of, require_unfused, start_record
from lora_kit.adapters.tokens import remove_tokens, require_tokenizer
from lora_kit.adapters.trained_parts import TrainedParts
from lora_kit.errors import TargetError
from lora_kit.targeting import Target, TargetPlan

PEFT_METHODS = ("lora", "rslora")
"""Methods that PEFT's LoRA layer trains; the others train as `TrainedParts`."""


def inject(
    components: Mapping[str, nn.Module], plan: TargetPlan, adapter_name: str = "default", seed: int = 0
) -> dict[str, list[nn.Parameter]]:
    """Adapt exactly the modules of `plan`; the rest of `components` is frozen. Returns `trainable_parameters`.

    Trainable weights are fp32 whatever the base's precision. LoRA: down is Kaiming-uniform (as in PEFT), drawn from
    (seed, module name) alone, up is zero, so the output is the base's. PEFT casts its inputs, so the network runs with
    or without autocast. `full`: the module's own weights; over a bf16 or fp16 base those need autocast. Every other
    method: see `TrainedParts`. The adapter is active at scale 1, beside any others.

    Raises TargetError, before anything is changed, if the plan is another model's or the name cannot be had.
    """
    check_name(components, adapter_name)
    modules = _planned_modules(components, plan)
    for network in components.values():
        start_record(network).adapters.append(adapter_name)
    for target in plan.targets:
        name = target.module.name
        if target.method == "full":
            _thaw(components, name, adapter_name)
        elif target.method in PEFT_METHODS and target.init != "pissa":
            put_module(components, name, with_adapter(modules[name], target, adapter_name, seed))
        else:
            put_module(components, name, _with_parts(modules[name], target, adapter_name, seed))
    trainable = trainable_parameters(components, plan, adapter_name)
    planned = {target.module.name for target in plan.targets if target.method != "full"}
    adapted = {name for name, layer in live_layers(components).items() if adapter_name in layer.adapters}
    assert adapted == planned, "other modules than the plan's were adapted"
    count = sum(weight.numel() for weights in trainable.values() for weight in weights if weight.requires_grad)
    assert count == plan.trainable_parameters, f"{count} parameters train, {plan.trainable_parameters} are planned"
    return trainable


def trainable_parameters(
    components: Mapping[str, nn.Module], plan: TargetPlan, adapter_name: str = "default"
) -> dict[str, list[nn.Parameter]]:
    """Target module's name → what trains there, in plan order: LoRA's [down, up], the parts of another method in the
    order of `Target.shapes`, or the module's own for `full`."""
    found: dict[str, list[nn.Parameter]] = {}
    for target in plan.targets:
        module = module_at(components, target.module.name)
        if target.method == "full":
            found[target.module.name] = list(base_layer(module).parameters(recurse=False))
            continue
        delta = live_layer(module).delta
        if delta is not None and adapter_name in delta.trained:
            found[target.module.name] = list(delta.trained[adapter_name].parameters())
            continue
        assert isinstance(module, LoraLayer), f"{target.module.name} carries no adapter"
        factors = (module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight)
        found[target.module.name] = [cast("nn.Parameter", factor) for factor in factors]
    return found


def eject(model: Model, adapter_name: str = "default") -> None:
    """Undo `inject` or `load_adapter`: the module objects come back, with the last adapter the requires_grad flags.

    model: a diffusers pipeline, a `ModelBundle`, or networks by name.

    Weights of `method: full` get their precision back but keep their trained values: a copy of the old ones
    would double the memory. Raises TargetError if there is no such adapter, or the adapters are fused.
    """
    components = components_of(model)
    require_unfused(components)
    require_adapter(components, adapter_name)
    require_tokenizer(model, components, adapter_name)
    remove_tokens(model, components, adapter_name)
    for name, layer in live_layers(components).items():
        if adapter_name in layer.adapters:
            put_module(components, name, _without(layer, adapter_name))
    for component, network in components.items():
        for name, dtype in record_of(network).full.pop(adapter_name, {}).items():
            weight = _own_parameter(components, f"{component}.{name}")
            weight.data = weight.data.to(dtype)
            weight.requires_grad_(False)
        forget(network, adapter_name)


def require_adapter(components: Mapping[str, nn.Module], adapter_name: str) -> None:
    """Raise TargetError unless an adapter of that name is injected."""
    present = adapter_names(components)
    if adapter_name not in present:
        listed = ", ".join(present) or "none"
        raise TargetError(f"no adapter is named `{adapter_name}`; the network carries: {listed}.")


def check_name(components: Mapping[str, nn.Module], adapter_name: str) -> None:
    """Raise TargetError unless a new adapter can be put in, under this name."""
    require_unfused(components)
    if adapter_name in adapter_names(components):
        raise TargetError(f"an adapter named `{adapter_name}` is injected already; eject it, or take another name.")
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
        said = "torch takes no empty name, no dot, and no name of ModuleDict's own such as `keys`"
        raise TargetError(f"`{adapter_name}` cannot name an adapter: {said}. Take another name.")


def _planned_modules(components: Mapping[str, nn.Module], plan: TargetPlan) -> dict[str, nn.Module]:
    """The plan's modules as they are in the networks now."""
    found: dict[str, nn.Module] = {}
    problems: list[str] = []
    for target in plan.targets:
        name, _, shape, _ = target.module
        try:
            found[name] = module_at(components, name)
        except (AttributeError, KeyError):
            problems.append(f"{name} is not in the model")
            continue
        got = tuple(getattr(base_layer(found[name]), "weight", torch.empty(0)).shape)
        if got != shape and shape:
            problems.append(f"{name} has shape {got}, the plan says {shape}")
        if target.method == "full" and isinstance(live_layer(found[name]).delta, DeltaLayer):
            problems.append(f"{name} carries an adapter that is no plain LoRA, over which its weight cannot train")
    if problems:
        listed = "\n  ".join(problems[:10] + ([f"… {len(problems) - 10} more"] if len(problems) > 10 else []))
        raise TargetError(f"the plan does not fit this model; make it from this one:\n  {listed}")
    return found


def _with_parts(module: nn.Module, target: Target, adapter_name: str, seed: int) -> nn.Module:
    """The DeltaLayer over `module`, under PEFT's layer if it has one, with an active new adapter that trains."""
    lora, delta, base = live_layer(module)
    delta = delta or DeltaLayer(base)
    delta.add(adapter_name, TrainedParts(target, cast(Tensor, base.weight), seed))
    return stacked(lora, delta, base)


def _without(layer: LiveLayer, adapter_name: str) -> nn.Module:
    """What stands in the module's place once the adapter is gone."""
    lora, delta, base = layer
    if lora is not None and adapter_name in lora.lora_A:
        activate(lora, [active for active in lora.active_adapters if active != adapter_name])
        lora.delete_adapter(adapter_name)
    if delta is not None and adapter_name in delta.updates:
        delta.remove(adapter_name)
    return stacked(lora if lora and lora.lora_A else None, delta if delta and delta.updates else None, base)


def _own_parameter(components: Mapping[str, nn.Module], name: str) -> nn.Parameter:
    module, _, own = name.rpartition(".")
    return base_layer(module_at(components, module)).get_parameter(own)


def _thaw(components: Mapping[str, nn.Module], name: str, adapter_name: str) -> None:
    """Train the module's own parameters, in fp32; the Parameter objects stay."""
    component, _, inner = name.partition(".")
    before = record_of(components[component]).full.setdefault(adapter_name, {})
    for own, weight in base_layer(module_at(components, name)).named_parameters(recurse=False):
        before[f"{inner}.{own}"] = weight.dtype
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    own_module = base_layer(module_at(components, name))
    if isinstance(own_module, nn.GroupNorm):
        own_module.register_forward_pre_hook(with_gradient)  # stays after `eject`, where it does nothing
