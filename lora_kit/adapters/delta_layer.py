"""A layer for every method that is no plain LoRA: the module itself, run with W + Σ ΔW in place of W."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

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
    while an adapter is active. With none active the module runs as it is. Updates do not train; they stay where they
    were read to (the CPU) and visit the weight's device only to be added up.

    A PEFT LoRA layer on the same module goes over this one: its part is added to the output.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base  # PEFT's name for it: what looks for the network's own module finds it
        self.updates: dict[str, Update] = {}
        """Adapter → what it does to this module."""
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

    def add(self, adapter_name: str, update: Update) -> None:
        """Take the update in, active at strength 1."""
        self.updates[adapter_name] = update
        self.set_scales({**self.scales, adapter_name: 1.0})

    def remove(self, adapter_name: str) -> None:
        """Forget the adapter."""
        del self.updates[adapter_name]
        self.set_scales({name: scale for name, scale in self.scales.items() if name != adapter_name})

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Make exactly these adapters active, at these strengths."""
        self.scales = {name: scale for name, scale in scales.items() if scale != 0}
        self._computed = None

    def totals(self) -> dict[str, Tensor]:
        """`weight` and `bias` → Σ Δ of the active adapters, fp32, on the parameter's device; others left out."""
        found: dict[str, Tensor] = {}
        for name, scale in self.scales.items():
            update = _moved(self.updates[name], self.weight.device)
            weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
            dtype = arithmetic_dtype(self.weight)
            deltas = update.weight_delta(scale, weight.to(dtype), dtype), update.bias_delta(scale, bias, dtype)
            for own, delta in zip(PARAMETERS, deltas, strict=True):
                if delta is not None:
                    found[own] = found[own] + delta if own in found else delta
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward with the changed parameters."""
        if not self.scales:
            return self.base_layer(*args, **kwargs)
        own = {name: weight for name, weight in self.base_layer.named_parameters(recurse=False) if name in PARAMETERS}
        key = (tuple(self.scales.items()), *map(_stamp, own.values()))
        if self._computed is None or self._computed.key != key:
            self._computed = _Computed(key, self._changed(own))
        return functional_call(self.base_layer, self._computed.parameters, args, kwargs)

    def _changed(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with exact_arithmetic(self.weight.device):
            return {name: changed(own[name], total) for name, total in self.totals().items()}


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
