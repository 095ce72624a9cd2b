"""Adapter files → live layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_kit.adapters.delta_layer import DeltaLayer
from lora_kit.adapters.injection import check_name, inject
from lora_kit.adapters.io import read_adapter
from lora_kit.adapters.layers import base_layer, live_layer, stacked
from lora_kit.adapters.places import Model, components_of, module_at, put_module
from lora_kit.adapters.record import record_of
from lora_kit.adapters.state import AdapterState, is_plain_lora, lora_layers, plain_lora, plan_for
from lora_kit.adapters.tokens import add_tokens, check_tokens
from lora_kit.adapters.updates import LoraUpdate, Update
from lora_kit.errors import AdapterFileError, did_you_mean
from lora_kit.targeting import module_tree

Source = str | Path | AdapterState | Mapping[str, Update]


def load_adapter(model: Model, source: Source, adapter_name: str = "default") -> AdapterState:
    """Put an adapter file's layers over a model's modules, active at strength 1 beside any others.

    model: a diffusers pipeline, a `ModelBundle`, or networks by name. source: a file of any layout that
    `read_adapter` reads, or what it returned, or updates by module name. Plain LoRA becomes PEFT layers in fp32 that
    hold the factors bit for bit; every other method a `DeltaLayer`. `set_scale` sets strengths, `eject` takes the
    adapter out again. Tokens that were learned with the adapter go into the tokenizer and text encoder, whatever the
    strength. The networks are frozen, components that the adapter does not touch stay as they are.

    Raises AdapterFileError for a file that is damaged or does not fit, TargetError for a name that cannot be had;
    before anything is changed.
    """
    networks = components_of(model)
    check_name(networks, adapter_name)
    state = _state(source, networks)
    plain = plain_lora({name: update for name, update in state.updates.items() if is_plain_lora(update)})
    others = {name: update for name, update in state.updates.items() if name not in plain}
    _check(networks, others)
    check_tokens(model, networks, state.embeddings)
    _inject(networks, plain, adapter_name)
    for name, update in others.items():
        lora, delta, base = live_layer(module_at(networks, name))
        delta = delta or DeltaLayer(base)
        delta.add(adapter_name, update)
        put_module(networks, name, stacked(lora, delta, base))
    add_tokens(model, networks, adapter_name, state.embeddings)
    return state


def _state(source: Source, networks: Mapping[str, nn.Module]) -> AdapterState:
    if isinstance(source, str | Path):
        return read_adapter(Path(source), networks)
    return source if isinstance(source, AdapterState) else AdapterState(dict(source), {})


@torch.no_grad()
def _inject(networks: Mapping[str, nn.Module], pairs: Mapping[str, LoraUpdate], adapter_name: str) -> None:
    inject(networks, plan_for(networks, pairs), adapter_name, 0)
    layers = lora_layers(networks, adapter_name)
    assert layers.keys() == pairs.keys(), "inject made other layers than the plan asked for"
    for name, update in pairs.items():
        _fill(layers[name].lora_A[adapter_name].weight, update.down)
        _fill(layers[name].lora_B[adapter_name].weight, update.up)


def _fill(weight: Tensor | nn.Module, factor: Tensor) -> None:
    assert isinstance(weight, Tensor)
    assert weight.shape == factor.shape, f"{tuple(weight.shape)} is not {tuple(factor.shape)}"
    weight.copy_(factor)


def _check(networks: Mapping[str, nn.Module], updates: Mapping[str, Update]) -> None:
    """Raise AdapterFileError listing every update that has no module, or no bias or frozen weight to change."""
    there = {module.name for module in module_tree(networks)}
    problems: list[str] = []
    for name, update in updates.items():
        problem = _problem(networks, name, update) if name in there else f"not in the model.{did_you_mean(name, there)}"
        if problem:
            problems.append(f"  {name}: {problem}")
    if problems:
        raise AdapterFileError("\n".join(["the adapter does not fit the model; nothing was loaded:", *problems]))


def _problem(networks: Mapping[str, nn.Module], name: str, update: Update) -> str:
    base = base_layer(module_at(networks, name))
    component, _, inner = name.partition(".")
    trained = {own for weights in record_of(networks[component]).full.values() for own in weights}
    if f"{inner}.weight" in trained:
        return f"its weight is being trained whole, which a {update.method} update over it would stop"
    bias = getattr(base, "bias", None)
    if not isinstance(bias, Tensor) and update.bias_delta(1.0, None) is not None:
        return "the file changes a bias, and the module has none"
    return ""
