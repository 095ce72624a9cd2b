"""What every method's update of one module can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor

FP32_ROUNDING = 2.0**-24
"""Unit roundoff of fp32."""

Parts = Mapping[str, Tensor]
"""Neutral part name → tensor."""
Shape = tuple[int, ...]


class Factors(NamedTuple):
    """A low-rank form: ΔW at strength 1 = (up @ down).view(weight's shape)."""

    up: Tensor
    """[out, r], with alpha / rank folded in."""
    down: Tensor
    """[r, in·kh·kw]."""


class Update(ABC):
    """What one adapter file does to one module. Subclasses are frozen dataclasses.

    Formulas and what a strength other than 1 means follow LyCORIS 4.1.3 (Yeh et al. 2023, "Navigating Text-To-Image
    Customization"; `get_merged_weight` of each of its modules). At strength 0 nothing changes, with any method.
    """

    alpha: float | None
    """As the file has it; None: it has none."""
    method: ClassVar[str]
    needed: ClassVar[frozenset[str]]
    """Parts without which the update makes no sense."""
    allowed: ClassVar[frozenset[str]]
    """All parts the method may have."""

    @classmethod
    @abstractmethod
    def from_parts(cls, parts: Parts, alpha: float | None, shape: Shape | None) -> Self:
        """The update in the shapes of a module whose weight has `shape`; None: in the parts' own shapes.

        Raises AdapterFileError (without the module's name) if the parts do not fit each other or the shape.
        """

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The tensors by neutral name, bit for bit as they were read, without alpha."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the parts are stored in; of several the widest."""
        found = [part.dtype for part in self.parts().values() if part.is_floating_point()]
        dtype = found[0]
        for other in found[1:]:
            dtype = torch.promote_types(dtype, other)
        return dtype

    @property
    def needs_weight(self) -> bool:
        """Whether ΔW depends on the module's own weight."""
        return False

    @property
    def rank(self) -> int | None:
        """Of the factors in the file; None where the method has none."""
        return None

    @abstractmethod
    def weight_delta(
        self, scale: float, weight: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        """ΔW at strength `scale`, computed and returned in `dtype`, in the weight's shape; None: no change.

        `weight` is the module's own, unadapted one; it must be given where `needs_weight`.
        """

    def bias_delta(self, scale: float, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Δbias [out] at strength `scale`; None: no change."""
        return None

    def factors(self, dtype: torch.dtype = torch.float32) -> Factors | None:
        """The exact low-rank form in `dtype`, or None where there is none (or it would be no smaller than ΔW)."""
        return None

    @property
    @abstractmethod
    def roundings(self) -> int:
        """Of how many fp32 roundings, one after the other, an element of ΔW is made (a dot of n terms counts n)."""

    def rounding(self, scale: float, weight: Tensor | None = None) -> Tensor:
        """Element by element, how far `weight_delta` in fp32 may be from its exact value; float64.

        Ask only where there is a ΔW. For an expression of sums and products alone, n roundings one after the other
        change it by at most n·u of its value with every tensor's absolute values put in (Higham 2002, section 3.1).
        """
        absolute = self._absolute().weight_delta(abs(scale), None if weight is None else weight.abs(), torch.float64)
        assert absolute is not None, "ask for the rounding of a ΔW only where there is one"
        return (self.roundings + 1) * FP32_ROUNDING * absolute

    def to(self, device: torch.device | str) -> Self:
        """The update with its tensors on `device`, in the precision they have."""
        return self._mapped(lambda part: part.to(device))

    def _absolute(self) -> Self:
        """The update with absolute values, in float64."""
        absolute = self._mapped(lambda part: part.double().abs())
        return absolute if self.alpha is None else cast("Self", replace(cast("Any", absolute), alpha=abs(self.alpha)))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        own = {field.name: getattr(self, field.name) for field in fields(cast("Any", self))}
        return cast("Self", replace(cast("Any", self), **{name: _mapped(one, change) for name, one in own.items()}))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in cast("dict[str, Any]", value).items()}
    return change(value) if isinstance(value, Tensor) else value


def required(weight: Tensor | None, update: Update, dtype: torch.dtype) -> Tensor:
    """The weight an update asks for, in `dtype`. Forgetting it is the caller's mistake."""
    assert weight is not None, f"ΔW of {update.method} depends on the module's weight: pass it"
    return weight.detach().to(dtype)
