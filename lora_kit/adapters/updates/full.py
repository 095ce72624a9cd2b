"""Whole differences of weights and biases: LyCORIS's `full` and `norm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_kit.adapters.updates.base import Parts, Shape, Update
from lora_kit.adapters.updates.fitting import check_names, fitted
from lora_kit.errors import AdapterFileError


@dataclass(frozen=True, eq=False)
class FullUpdate(Update):
    """ΔW = scale · diff, Δbias = scale · diff_b. One of the two may be missing."""

    diff: Tensor | None
    """The weight's shape."""
    diff_b: Tensor | None = None
    """[out]."""
    alpha: float | None = None
    """Kept if a file has one; it means nothing here."""

    method: ClassVar[str] = "full"
    needed: ClassVar[frozenset[str]] = frozenset()
    allowed: ClassVar[frozenset[str]] = frozenset({"diff", "diff_b"})

    @classmethod
    def from_parts(cls, parts: Parts, alpha: float | None, shape: Shape | None) -> FullUpdate:
        """See `Update.from_parts`."""
        check_names(parts, cls.needed, cls.allowed, cls.method)
        bias = parts.get("diff_b")
        if "diff" not in parts:
            if bias is None:
                raise AdapterFileError("neither diff nor diff_b is there")
            return cls(None, fitted_bias(bias, shape[0] if shape else bias.numel()), alpha)
        wanted = shape or tuple(parts["diff"].shape)
        diff = fitted(parts, {"diff": wanted}, shape)["diff"]
        return cls(diff, fitted_bias(bias, diff.shape[0] if diff.ndim else 0), alpha)

    def parts(self) -> dict[str, Tensor]:
        """What there is of `diff` and `diff_b`."""
        own = {"diff": self.diff, "diff_b": self.diff_b}
        return {name: part for name, part in own.items() if part is not None}

    def weight_delta(
        self, scale: float, weight: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        """See `Update.weight_delta`."""
        return None if self.diff is None else self.diff.to(dtype) * scale

    def bias_delta(self, scale: float, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """See `Update.bias_delta`."""
        return None if self.diff_b is None else self.diff_b.to(dtype) * scale

    @property
    def roundings(self) -> int:
        """See `Update.roundings`."""
        return 2


@dataclass(frozen=True, eq=False)
class NormUpdate(Update):
    """The same for a layer norm or a group norm, whose weight is a vector."""

    w_norm: Tensor
    """[channels]."""
    b_norm: Tensor | None = None
    """[channels]."""
    alpha: float | None = None
    """Kept if a file has one; it means nothing here."""

    method: ClassVar[str] = "norm"
    needed: ClassVar[frozenset[str]] = frozenset({"w_norm"})
    allowed: ClassVar[frozenset[str]] = frozenset({"w_norm", "b_norm"})

    @classmethod
    def from_parts(cls, parts: Parts, alpha: float | None, shape: Shape | None) -> NormUpdate:
        """See `Update.from_parts`."""
        check_names(parts, cls.needed, cls.allowed, cls.method)
        if shape is not None and len(shape) != 1:
            raise AdapterFileError(f"w_norm is for a norm layer, but the module's weight is {list(shape)}")
        size = shape or (parts["w_norm"].numel(),)
        found = fitted(parts, {"w_norm": size, "b_norm": size}, shape)
        return cls(found["w_norm"], found.get("b_norm"), alpha)

    def parts(self) -> dict[str, Tensor]:
        """`w_norm`, and `b_norm` if there is one."""
        return {"w_norm": self.w_norm} | ({} if self.b_norm is None else {"b_norm": self.b_norm})

    def weight_delta(
        self, scale: float, weight: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        """See `Update.weight_delta`."""
        return self.w_norm.to(dtype) * scale

    def bias_delta(self, scale: float, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """See `Update.bias_delta`."""
        return None if self.b_norm is None else self.b_norm.to(dtype) * scale

    @property
    def roundings(self) -> int:
        """See `Update.roundings`."""
        return 2


def fitted_bias(bias: Tensor | None, out: int) -> Tensor | None:
    """The Δbias as [out]. Raises AdapterFileError if it is of another size."""
    if bias is not None and bias.shape != (out,):
        raise AdapterFileError(f"diff_b {list(bias.shape)} does not fit the module's bias; allowed: [{out}]")
    return bias
