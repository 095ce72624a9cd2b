"""Live adapters into the weights and out again, exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_kit.adapters.delta_layer import arithmetic_dtype, changed, exact_arithmetic
from lora_kit.adapters.layers import LiveLayer, live_layers
from lora_kit.adapters.places import Model, components_of, module_at, put_module
from lora_kit.adapters.record import Fused, adapter_names, is_fused, record_of, require_unfused
from lora_kit.errors import TargetError

Keep = Literal["cpu", "none"]


class FuseReport(NamedTuple):
    """What `fuse` did."""

    parameters: int
    """Weights and biases that changed."""
    kept_bytes: int
    """Memory on the CPU that holds the originals."""


def fuse(model: Model, keep: Keep = "cpu") -> FuseReport:
    """Add every live adapter, at the strengths that `set_scale` gave, to the weights, and take the layers out.

    W' = W + Σ ΔW in fp32, cast once into the parameter itself: the network's own modules and Parameter objects are
    left, at a plain network's speed. requires_grad and training modes are not touched. Until `unfuse`, adapters
    cannot be loaded, scaled or ejected.

    keep: "cpu" holds a copy of each changed parameter on the CPU, as much memory as they take in the network.
    "none" holds a sha256 of each, and `unfuse` reads the originals from a base that it is given.

    Raises TargetError, before anything is changed, if nothing is live, the adapters are fused already, a PEFT
    adapter that lora_kit did not inject is active, a weight is quantised, or one would overflow fp16.
    """
    networks = components_of(model)
    require_unfused(networks)
    if keep not in ("cpu", "none"):
        raise TargetError(f'keep: got {keep!r}; allowed: "cpu" or "none".')
    if not adapter_names(networks):
        raise TargetError("there is no adapter to fuse; load_adapter or inject one first.")
    layers = live_layers(networks)
    _check_foreign(networks, layers)
    _check_quantised(layers)
    _check_overflow(layers)
    for component, network in networks.items():
        own = {name.partition(".")[2]: _top(layer) for name, layer in layers.items() if _is_in(name, component)}
        record_of(network).fused = Fused(own)
    count = 0
    for name, layer in layers.items():
        count += _fuse_one(networks, name, layer, keep)
        put_module(networks, name, layer.base)
        _move_factors(layer, torch.device("cpu"))
    originals = [one for network in networks.values() for one in _fused(network).originals.values()]
    return FuseReport(count, sum(one.numel() * one.element_size() for one in originals))


def unfuse(model: Model, base: Model = None) -> None:
    """Undo `fuse`: the original weights bit for bit, and the adapters live at the strengths they had.

    base: where the originals are, needed after `fuse(keep="none")`: a bundle, pipeline or networks loaded from the
    same base, on the CPU. They are cast to the model's precision and must have the bits that `fuse` saw.

    Raises TargetError, before anything is changed, if nothing is fused, `base` is missing, or it is another base.
    """
    networks = components_of(model)
    if not is_fused(networks):
        raise TargetError("nothing is fused.")
    originals = {name: _originals(name, network, base) for name, network in networks.items()}
    for component, network in networks.items():
        with torch.no_grad():
            for name, original in originals[component].items():
                network.get_parameter(name).copy_(original)
        for name, layer in _fused(network).layers.items():
            own = module_at(networks, f"{component}.{name}")
            put_module(networks, f"{component}.{name}", layer)
            layer.train(own.training)
        record_of(network).fused = None
    for layer in live_layers(networks).values():
        _move_factors(layer, cast(Tensor, layer.base.weight).device)


def total_deltas(layer: LiveLayer) -> dict[str, Tensor]:
    """`weight` and `bias` → Σ Δ of what is active on one module, fp32; unchanged ones are left out."""
    weight = cast(Tensor, layer.base.weight)
    with exact_arithmetic(weight.device):
        totals = layer.delta.totals() if layer.delta else {}
        for name in layer.lora.active_adapters if layer.lora else []:
            delta = _lora_delta(cast(LoraLayer, layer.lora), name, arithmetic_dtype(weight)).reshape(weight.shape)
            totals["weight"] = totals["weight"] + delta if "weight" in totals else delta
    return totals


def _lora_delta(layer: LoraLayer, adapter_name: str, dtype: torch.dtype) -> Tensor:
    """scale · (alpha / rank) · up · down: [out, in·kh·kw]."""
    down, up = (cast(Tensor, side[adapter_name].weight).detach().to(dtype) for side in (layer.lora_A, layer.lora_B))
    return (up.flatten(1) * layer.scaling[adapter_name]) @ down.flatten(1)


def _fuse_one(networks: Mapping[str, nn.Module], name: str, layer: LiveLayer, keep: Keep) -> int:
    component, _, inner = name.partition(".")
    fused = _fused(networks[component])
    totals = total_deltas(layer)
    for own, total in totals.items():
        parameter = cast(Tensor, getattr(layer.base, own))
        # First remembered, then changed: an interruption in between can be undone.
        if keep == "cpu":
            fused.originals[f"{inner}.{own}"] = parameter.detach().to("cpu", copy=True)
        else:
            fused.digests[f"{inner}.{own}"] = _digest(parameter)
        with torch.no_grad():
            if total.dtype == parameter.dtype:
                parameter.add_(total.reshape(parameter.shape))  # the same bits as below, without a third tensor
            else:
                parameter.copy_(changed(parameter, total))
    return len(totals)


def _originals(component: str, network: nn.Module, base: Model) -> dict[str, Tensor]:
    """Parameter → its original, in the network's precision as it is now."""
    fused = _fused(network)
    found = {name: one.to(network.get_parameter(name).dtype) for name, one in fused.originals.items()}
    if not fused.digests:
        return found
    if base is None:
        raise TargetError(
            'the originals were not kept (fuse(keep="none")); pass base=…, a bundle, pipeline or networks loaded from '
            "the same base."
        )
    source = components_of(base).get(component, nn.Module())
    wrong: list[str] = []
    for name, digest in fused.digests.items():
        original = _parameter(source, name)
        cast_ = None if original is None else original.to(network.get_parameter(name).dtype)
        if cast_ is None or _digest(cast_) != digest:
            wrong.append(f"{component}.{name}")
        else:
            found[name] = cast_
    if wrong:
        listed = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise TargetError(
            f"base: {len(wrong)} parameters are not the ones that the adapters were fused into: {listed}. Load the "
            "same base in the same precision, without adapters. Nothing was changed."
        )
    return found


def _parameter(network: nn.Module, name: str) -> Tensor | None:
    return dict(network.named_parameters()).get(name)


def _digest(parameter: Tensor) -> str:
    flat = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _check_foreign(networks: Mapping[str, nn.Module], layers: Mapping[str, LiveLayer]) -> None:
    own = adapter_names(networks)
    active = {name for layer in layers.values() if layer.lora for name in layer.lora.active_adapters}
    foreign = sorted(active - set(own))
    if foreign:
        raise TargetError(
            f"{', '.join(foreign)}: was not put in by lora_kit, and may be more than it would fuse. Unload it first, "
            "or load its file with load_adapter."
        )


def _check_quantised(layers: Mapping[str, LiveLayer]) -> None:
    """A weight in 4 or 8 bits cannot take a ΔW: most of it would be rounded away."""
    found = [name for name, layer in layers.items() if not cast(Tensor, layer.base.weight).is_floating_point()]
    if found:
        raise TargetError(
            f"{len(found)} weights are quantised ({', '.join(found[:3])}) and cannot take an adapter in. Nothing was "
            "fused; load the base in fp32, bf16 or fp16 for it, or merge the adapter's file into it (`lora-kit merge`)."
        )


def _check_overflow(layers: Mapping[str, LiveLayer]) -> None:
    """fp16 alone is so narrow that W + ΔW may leave it: work it out before the first weight changes."""
    overflown: list[str] = []
    for name, layer in layers.items():
        for own, total in total_deltas(layer).items() if _is_half(layer.base) else ():
            if not bool(torch.isfinite(changed(cast(Tensor, getattr(layer.base, own)), total)).all()):
                overflown.append(f"{name}.{own}")
    if overflown:
        listed = ", ".join(overflown[:5])
        raise TargetError(
            f"{len(overflown)} parameters with the adapters added do not fit into fp16 ({listed}). Nothing was fused; "
            "lower the scales, or load the base in bf16 or fp32."
        )


def _is_half(base: nn.Module) -> bool:
    return cast(Tensor, base.weight).dtype == torch.float16


def _top(layer: LiveLayer) -> nn.Module:
    top = layer.lora or layer.delta
    assert top is not None, "a live layer is one or both"
    return cast(nn.Module, top)


def _move_factors(layer: LiveLayer, device: torch.device) -> None:
    """LoRA's factors leave the GPU while they are fused."""
    if layer.lora is not None:
        layer.lora.lora_A.to(device)
        layer.lora.lora_B.to(device)


def _fused(network: nn.Module) -> Fused:
    return record_of(network).fused or Fused({})


def _is_in(name: str, component: str) -> bool:
    return name.partition(".")[0] == component
