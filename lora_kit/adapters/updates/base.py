"""What every method's update of one module can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from lora_kit.errors import AdapterFileError

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
    """What one adapter file does to one module (Hu et al. 2021; LyCORIS: Yeh et al. 2023). Subclasses are frozen."""

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

    def rounding(self, scale: float, weight: Tensor | None = None) -> Tensor:
        """Element by element, how far `weight_delta` in fp32 may be from its exact value; float64.

        Ask only where there is a ΔW. A first-order bound (Higham 2002, chapter 3) with a margin of two for the rest.
        """
        raise NotImplementedError(self.method)

    def factors(self, dtype: torch.dtype = torch.float32) -> Factors | None:
        """The exact low-rank form in `dtype`, or None where there is none (or it would be no smaller than ΔW)."""
        return None


def require(weight: Tensor | None, update: Update, dtype: torch.dtype) -> Tensor:
    """The weight an update asks for, in `dtype`. Forgetting it is the caller's mistake."""
    assert weight is not None, f"ΔW of {update.method} depends on the module's weight: pass it"
    return weight.to(dtype)


def check_names(names: Collection[str], needed: Collection[str], allowed: Collection[str], method: str) -> None:
    """Raise AdapterFileError unless `needed` ⊆ `names` ⊆ `allowed`."""
    missing, extra = sorted(set(needed) - set(names)), sorted(set(names) - set(allowed))
    problems: list[str] = []
    if missing:
        problems.append(f"the {' and '.join(missing)} {'half is' if len(missing) == 1 else 'halves are'} missing")
    if extra:
        problems.append(f"{', '.join(extra)} is no part of a {method} update")
    if problems:
        raise AdapterFileError("; ".join(problems))


def reshaped(part: Tensor, shape: Shape) -> Tensor | None:
    """The part in `shape`, or None. [a, b] and [a, b, 1, 1] are one matrix: files have both."""
    if matrix_shape(tuple(part.shape)) != matrix_shape(shape):
        return None
    return part.reshape(shape)


def matrix_shape(shape: Shape) -> Shape:
    """Without a 1×1 kernel."""
    return shape[:2] if shape[2:] == (1, 1) else shape
