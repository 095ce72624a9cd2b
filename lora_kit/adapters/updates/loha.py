"""LoHa: the elementwise product of two low-rank matrices (Hyeon-Woo et al. 2022, "FedPara", proposition 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_kit.adapters.updates.base import Factors, Parts, Shape
from lora_kit.adapters.updates.dora import Decomposable, fitted_magnitude
from lora_kit.adapters.updates.fitting import check_dimensions, check_matrices, check_names, fitted, flat_kernel
from lora_kit.adapters.updates.tucker import unfolded

_MATRICES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@dataclass(frozen=True, eq=False)
class LohaUpdate(Decomposable):
    """ΔW = scale · (alpha / rank) · (w1_a · w1_b) ∘ (w2_a · w2_b).

    That is what LyCORIS's `forward` trains; its `get_merged_weight` (3.1.1 to 4.1.3) multiplies by alpha / rank twice.
    """

    w1_a: Tensor
    """[out, r]; with a core [r, out]."""
    w1_b: Tensor
    """[r, in·kh·kw]; with a core [r, in]."""
    w2_a: Tensor
    w2_b: Tensor
    alpha: float | None
    """None: the rank."""
    shape: Shape
    """The weight's."""
    t1: Tensor | None = None
    """The first half's Tucker core [r, r, kh, kw]."""
    t2: Tensor | None = None
    magnitude: Tensor | None = None

    method: ClassVar[str] = "loha"
    needed: ClassVar[frozenset[str]] = frozenset(_MATRICES)
    allowed: ClassVar[frozenset[str]] = frozenset({*_MATRICES, *_CORES, "magnitude"})

    @classmethod
    def from_parts(cls, parts: Parts, alpha: float | None, shape: Shape | None) -> LohaUpdate:
        """See `Update.from_parts`. Of a core's pair both must be there."""
        tucker = any(name in parts for name in _CORES)
        check_names(parts, cls.needed | (set(_CORES) if tucker else set()), cls.allowed, cls.method)
        check_matrices(parts, (*_MATRICES, *_CORES))
        rank = parts["hada_w1_b"].shape[0]
        full = shape or _own_shape(parts, tucker)
        check_dimensions(parts, full)
        out, inner, *kernel = full
        if tucker:
            core, a, b = (rank, rank, *kernel), (rank, out), (rank, inner)
        else:
            core, a, b = (), (out, rank), (rank, inner * math.prod(kernel))
            for name in ("hada_w1_b", "hada_w2_b"):
                parts = flat_kernel(parts, name, full[1:])
        wanted: dict[str, Shape] = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
        found = fitted(parts, wanted | ({"hada_t1": core, "hada_t2": core} if tucker else {}), shape)
        magnitude = fitted_magnitude(parts.get("magnitude"), full)
        w1_a, w1_b, w2_a, w2_b = (found[name] for name in _MATRICES)
        return cls(w1_a, w1_b, w2_a, w2_b, alpha, full, found.get("hada_t1"), found.get("hada_t2"), magnitude)

    def parts(self) -> dict[str, Tensor]:
        """The four matrices and what there is of cores and magnitude."""
        own = {"hada_w1_a": self.w1_a, "hada_w1_b": self.w1_b, "hada_w2_a": self.w2_a, "hada_w2_b": self.w2_b}
        optional = {"hada_t1": self.t1, "hada_t2": self.t2, "magnitude": self.magnitude}
        return own | {name: part for name, part in optional.items() if part is not None}

    @property
    def rank(self) -> int:
        """Of each of the two matrices; ΔW itself may have its square."""
        return self.w1_b.shape[0]

    def product(self, scale: float, dtype: torch.dtype) -> Tensor:
        """See `Decomposable.product`."""
        (up1, down1), (up2, down2) = self._halves(scale, dtype)
        return ((up1 @ down1) * (up2 @ down2)).reshape(self.shape)

    def factors(self, dtype: torch.dtype = torch.float32) -> Factors | None:
        """Rank r²: (A·B) ∘ (C·D) = (A ⊙ C) · (B ⊙ D) with row- and column-wise Khatri-Rao products (Slyusar 1999).

        None with a magnitude, or if r² is no less than the weight's own sides.
        """
        if self.magnitude is not None or self.rank**2 >= min(self.shape[0], math.prod(self.shape[1:])):
            return None
        (up1, down1), (up2, down2) = self._halves(1.0, dtype)
        up = torch.einsum("or,os->ors", up1, up2).flatten(1)
        return Factors(up, torch.einsum("rq,sq->rsq", down1, down2).flatten(0, 1))

    def _halves(self, scale: float, dtype: torch.dtype) -> tuple[Factors, Factors]:
        alpha = self.rank if self.alpha is None else self.alpha
        first, second = (
            _half(a.to(dtype), b.to(dtype), core)
            for a, b, core in ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2))
        )
        return Factors(first.up * (scale * alpha / self.rank), first.down), second

    @property
    def roundings(self) -> int:
        """See `Update.roundings`."""
        return 2 * self.rank * (1 if self.t1 is None else 2) + 5


def _half(a: Tensor, b: Tensor, core: Tensor | None) -> Factors:
    return Factors(a, b) if core is None else Factors(a.T, unfolded(core.to(a.dtype), b))


def _own_shape(parts: Parts, tucker: bool) -> Shape:
    a, b = parts["hada_w1_a"], parts["hada_w1_b"]
    return (a.shape[1], b.shape[1], *parts["hada_t1"].shape[2:]) if tucker else (a.shape[0], *b.shape[1:])
