"""A layer for every method that is no plain LoRA: the module itself, run with W + Σ ΔW in place of W."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_kit.adapters.dropouts import left_out
from lora_kit.adapters.group_norms import with_gradient
from lora_kit.adapters.trained_parts import TrainedParts
from lora_kit.adapters.updates import Update

PARAMETERS = ("weight", "bias")
"""What an update can change."""


class _Computed(NamedTuple):
    """The parameters that stand in for the module's own, and what they were computed from."""

    key: tuple[Any, ...]
    parameters: dict[str, Tensor]


class DeltaLayer(nn.Module):
    """Runs `base_layer` with W' = W + Σ ΔW(scale), computed in fp32 and cast once to W's precision; biases too.

    Every update that depends on the weight sees W, not what others make of it, so their order plays no part. W' is
    computed at the first use and kept until a scale, or W itself, changes: a second copy of the weight in memory
    while an adapter is active. With none active the module runs as it is. Updates that were read do not train; they
    stay where they were read to (the CPU) and visit the weight's device only to be added up. Those that train are
    `TrainedParts`.

    A PEFT LoRA layer on the same module goes over this one: its part is added to the output.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base  # PEFT's name for it: what looks for the network's own module finds it
        self.trained = nn.ModuleDict()
        """Adapter → its `TrainedParts`, of those that train."""
        self._read: dict[str, Update] = {}
        self.scales: dict[str, float] = {}
        """Adapter → strength; one at 0 is off."""
        self.training = base.training
        self._computed: _Computed | None = None

    @property
    def weight(self) -> Tensor:
        """The module's own weight, for code that asks for its precision or device."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The module's own bias."""
        return cast("Tensor | None", self.base_layer.bias)

    @property
    def updates(self) -> dict[str, Update]:
        """Adapter → what it does to this module, as it is now."""
        return self._read | {name: self._parts(name).update() for name in self.trained}

    def add(self, adapter_name: str, update: Update | TrainedParts) -> None:
        """Take the update in, active at strength 1."""
        if isinstance(update, TrainedParts):
            self.trained[adapter_name] = update
        else:
            self._read[adapter_name] = update
        self.set_scales({**self.scales, adapter_name: 1.0})

    def remove(self, adapter_name: str) -> None:
        """Forget the adapter."""
        if adapter_name in self.trained:
            del self.trained[adapter_name]
        else:
            del self._read[adapter_name]
        self.set_scales({name: scale for name, scale in self.scales.items() if name != adapter_name})

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Make exactly these adapters active, at these strengths."""
        self.scales = {name: scale for name, scale in scales.items() if scale != 0}
        self._computed = None

    def totals(self) -> dict[str, Tensor]:
        """`weight` and `bias` → Σ Δ of the active adapters, fp32, on the parameter's device; others left out."""
        return self._totals(self.scales)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward with the changed parameters, and what trains added to the output.

        Every module that can be adapted is linear in its parameters, so ΔW can act by itself: a bf16 W + ΔW would
        round small changes away. It is computed anew each time, in fp32 outside autocast, and then cast to W's
        precision.
        """
        still = {name: scale for name, scale in self.scales.items() if name not in self.trained}
        output = self._with_read(still, args, kwargs) if still else self.base_layer(*args, **kwargs)
        for name, scale in self.scales.items():
            if name in self.trained and not (self.training and left_out(self._parts(name).module_dropout)):
                output = output + self._by_itself(name, scale, args, kwargs)
        return output

    def _with_read(self, scales: Mapping[str, float], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = self._own()
        key = (tuple(scales.items()), *map(_stamp, own.values()))
        if self._computed is None or self._computed.key != key:
            with exact_arithmetic(self.weight.device):
                totals = self._totals(scales)
                self._computed = _Computed(key, {name: changed(own[name], total) for name, total in totals.items()})
        return functional_call(self.base_layer, self._computed.parameters, args, kwargs)

    def _by_itself(self, name: str, scale: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What ΔW and Δbias make of the input."""
        own = self._own()
        with torch.autocast(self.weight.device.type, enabled=False):
            totals = self._totals({name: scale})
            alone = {
                key: totals[key].to(own[key].dtype) if key in totals else torch.zeros_like(own[key]) for key in own
            }
        parts = self._parts(name)
        if parts.rank_dropout and self.training:
            kept = torch.rand(len(alone["weight"]), device=self.weight.device) >= parts.rank_dropout
            alone["weight"] = alone["weight"] * kept.view(-1, *(1 for _ in self.weight.shape[1:]))
        dropout = parts.dropout
        inputs = (nn.functional.dropout(args[0], dropout, self.training), *args[1:]) if dropout else args
        return functional_call(self.base_layer, alone, with_gradient(self.base_layer, inputs), kwargs)

    def _parts(self, name: str) -> TrainedParts:
        return cast(TrainedParts, self.trained[name])

    def _own(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in self.base_layer.named_parameters(recurse=False) if name in PARAMETERS}

    def _totals(self, scales: Mapping[str, float]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        updates, dtype = self.updates, arithmetic_dtype(self.weight)
        weight, bias = self.weight.detach().to(dtype), None if self.bias is None else self.bias.detach()
        for name, scale in scales.items():
            update = updates[name] if name in self.trained else _moved(updates[name], weight.device)
            deltas = update.weight_delta(scale, weight, dtype), update.bias_delta(scale, bias, dtype)
            away = self._parts(name).taken_away() if name in self.trained else None
            if away is not None and deltas[0] is not None:
                deltas = deltas[0] - cast(Tensor, away.weight_delta(scale, weight, dtype)), deltas[1]
            for own, delta in zip(PARAMETERS, deltas, strict=True):
                if delta is not None:
                    found[own] = found[own] + delta if own in found else delta
        return found


def changed(weight: Tensor, total: Tensor) -> Tensor:
    """W + ΔW in ΔW's precision, cast once to W's."""
    return (weight.detach().to(total.dtype) + total.reshape(weight.shape)).to(weight.dtype)


def arithmetic_dtype(weight: Tensor) -> torch.dtype:
    """fp32, or the weight's own precision where that is higher."""
    return torch.promote_types(weight.dtype, torch.float32)


@contextmanager
def exact_arithmetic(device: torch.device) -> Generator[None]:
    """No gradients, no autocast (it would multiply in bf16), and tensors that autograd takes later."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _moved(update: Update, device: torch.device) -> Update:
    """The update with its tensors on `device`; itself if they are there."""
    if all(part.device == device for part in update.parts().values()):
        return update
    record = cast(Any, update)
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return dataclasses.replace(record, **{name: _on(value, device) for name, value in fields.items()})


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {name: _on(one, device) for name, one in cast("Mapping[str, Any]", value).items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _stamp(weight: Tensor) -> tuple[Any, ...]:
    """Changes whenever the parameter does: by an optimizer, `load_state_dict`, `.to(…)`, or another in its place."""
    version = 0 if weight.is_inference() else weight._version
    return (id(weight), weight.data_ptr(), version, weight.dtype, weight.device)
