"""A device whose values the host cannot have: torch's meta device, watched as a GPU would have to be waited for.

There a tensor has a shape and no numbers, so that whatever reads one fails; copies to and from it are seen on the way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_kit.models import moving
from lora_kit.training import late
from lora_kit.training.objects import Run

META = torch.device("meta")
READS_LATE = True
"""What `put_there` makes of the run's steps."""
_ATEN: Any = torch.ops.aten
_READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "_linalg_check_errors", "unique", "unique2"}


class Waits(TorchDispatchMode):
    """Lists what of the code inside would wait for a GPU in the place of the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pinned: set[int] = set()
        self.kept: list[Tensor] = []
        """What was page-locked: an id is its own only while the tensor is there."""
        self._calls = _Calls(self.found)

    def __enter__(self) -> Waits:
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        kinds = {one.device.type for one in tensors if one.device == META or one.ndim}
        if func is _ATEN._to_copy.default and kwargs.get("device", args[0].device).type != args[0].device.type:
            return self._copied(args[0], kwargs)
        if func is _ATEN.copy_.default and args[0].device != args[1].device:
            return self._copied(args[1], {"device": args[0].device, "non_blocking": len(args) > 2 and args[2]})
        if kinds == {"cpu", "meta"}:  # numbers without a dimension are handed over with the kernel
            self.found.append(f"{func}: a tensor on the CPU among the device's")
        if "meta" in kinds and func.overloadpacket.__name__ in _READS:
            self.found.append(f"{func}: read by the host")
        return func(*args, **kwargs)

    def _copied(self, source: Tensor, options: Any) -> Tensor:
        to = options["device"]
        if not options.get("non_blocking"):
            self.found.append(f"{list(source.shape)} copied to {to}, waiting")
        elif source.device != META and id(source) not in self.pinned:
            self.found.append(f"{list(source.shape)} copied to {to} from memory that is not page-locked")
        return torch.zeros(source.shape, dtype=options.get("dtype") or source.dtype, device=to)

    def pin(self, tensor: Tensor) -> Tensor:
        """Stands for `Tensor.pin_memory`."""
        copy = tensor.clone()
        self.pinned.add(id(copy))
        self.kept.append(copy)
        return copy


class _Calls(TorchFunctionMode):
    """What makes a tensor of Python's numbers on the device is seen only here: the copy is torch's own."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == META:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in parts):
                self.found.append("indexed by a list, which is copied, waiting")
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == META:
            self.found.append("torch.tensor(…, device) copies, waiting")
        return func(*args, **kwargs)


def watched(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """What watches, with torch and the code under test made to take the meta device for one with a queue."""
    waits = Waits()
    monkeypatch.setattr(Accelerator, "device", META)
    for module in (moving, late):
        monkeypatch.setattr(module, "QUEUES", {"meta"})
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: waits.pin(tensor))
    monkeypatch.setattr(
        sys.modules[torch.optim.Adam.__module__], "_device_dtype_check_for_fused", lambda *_, **__: None
    )
    for name in ("is_autocast_enabled", "get_autocast_dtype", "autocast"):
        monkeypatch.setattr(torch, name, _as_on_cpu(getattr(torch, name)))
    return waits


def _as_on_cpu(function: Any) -> Any:
    def called(device_type: str, *args: Any, **options: Any) -> Any:
        return function("cpu", *args, **options)

    return called


def put_there(run: Run) -> Run:
    """The run with its networks and its average on the meta device, parameters still the same objects."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for network in run.bundle.networks:
            network.to(META)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    run.bundle.recall = None  # else what lies there would be taken for given back
    _to_meta(vars(run.average)["_model"].shadow_params if run.average.is_moving else [])
    return run._replace(learner=run.learner._replace(reads_late=READS_LATE))


def _to_meta(tensors: list[Tensor]) -> None:
    tensors[:] = [tensor.to(META) for tensor in tensors]


def on_meta(tensors: Iterable[Tensor]) -> bool:
    """Whether all lie there."""
    return all(tensor.device == META for tensor in tensors)
