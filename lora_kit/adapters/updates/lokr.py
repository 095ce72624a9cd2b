"""LoKr: a Kronecker product (Edalati et al. 2022, "KronA"; Yeh et al. 2023, section 3.2)."""

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
from lora_kit.errors import AdapterFileError

_PRODUCTS = {"lokr_w1": ("lokr_w1_a", "lokr_w1_b"), "lokr_w2": ("lokr_w2_a", "lokr_w2_b", "lokr_t2")}
"""What each of the two may be made of."""
_NAMES = (*_PRODUCTS, *_PRODUCTS["lokr_w1"], *_PRODUCTS["lokr_w2"])


@dataclass(frozen=True, eq=False)
class LokrUpdate(Decomposable):
    """ΔW = scale · (alpha / rank) · w1 ⊗ w2, each whole or a product of two; if both are whole, alpha has no say.

    That is what LyCORIS's `forward` trains; its `get_merged_weight` (4.1.3) multiplies by alpha / rank twice.
    """

    tensors: dict[str, Tensor]
    """By neutral name. w1 [a, c] = w1_a [a, r] · w1_b [r, c]; w2 [b, d, kh, kw] = w2_a [b, r] · w2_b [r, d·kh·kw], or
    from t2 [r, r, kh, kw], w2_a [r, b] and w2_b [r, d]; out = a·b, in = c·d."""
    alpha: float | None
    """None: the rank."""
    shape: Shape
    """The weight's."""
    magnitude: Tensor | None = None

    method: ClassVar[str] = "lokr"
    needed: ClassVar[frozenset[str]] = frozenset()
    allowed: ClassVar[frozenset[str]] = frozenset({*_NAMES, "magnitude"})

    @classmethod
    def from_parts(cls, parts: Parts, alpha: float | None, shape: Shape | None) -> LokrUpdate:
        """See `Update.from_parts`."""
        check_names(parts, _missing(parts), cls.allowed, cls.method)
        check_matrices(parts, _NAMES)
        rows, columns = _first_sides(parts)
        full = shape or _own_shape(parts)
        check_dimensions(parts, full)
        out, inner, *kernel = full
        if out % rows or inner % columns:
            raise AdapterFileError(
                f"lokr_w1 [{rows}, {columns}] does not divide the module's weight {list(full)}: its sides must be "
                "divisors of the weight's first two"
            )
        b, d = out // rows, inner // columns
        if "lokr_w2_b" in parts and "lokr_t2" not in parts:
            parts = flat_kernel(parts, "lokr_w2_b", (d, *kernel))
        found = fitted(parts, _wanted(parts, (rows, columns), (b, d, *kernel)), shape)
        ranks = {found[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in found}
        if len(ranks) > 1:
            raise AdapterFileError(f"the ranks of lokr_w1_b and lokr_w2_b are not one: {sorted(ranks)}")
        return cls(found, alpha, full, fitted_magnitude(parts.get("magnitude"), full))

    def parts(self) -> dict[str, Tensor]:
        """What there is of w1, w2 and their factors, and the magnitude."""
        return self.tensors | ({} if self.magnitude is None else {"magnitude": self.magnitude})

    @property
    def rank(self) -> int | None:
        """Of the factors; None if both are whole."""
        found = [self.tensors[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in self.tensors]
        return found[0] if found else None

    def product(self, scale: float, dtype: torch.dtype) -> Tensor:
        """See `Decomposable.product`."""
        w1, w2 = self._whole("lokr_w1", dtype), self._whole("lokr_w2", dtype)
        return torch.kron(w1 * self._strength(scale), w2).reshape(self.shape)

    def factors(self, dtype: torch.dtype = torch.float32) -> Factors | None:
        """(A·B) ⊗ (C·D) = (A ⊗ C) · (B ⊗ D), a whole factor taken as itself times the identity.

        None with a magnitude, or if that rank is no less than the weight's own sides.
        """
        if self.magnitude is not None:
            return None
        first, second = self._pair("lokr_w1", dtype), self._pair("lokr_w2", dtype)
        if first.down.shape[0] * second.down.shape[0] >= min(self.shape[0], math.prod(self.shape[1:])):
            return None
        up = torch.kron(first.up * self._strength(1.0), second.up)
        return Factors(up, torch.kron(first.down, second.down))

    def _strength(self, scale: float) -> float:
        return scale if self.rank is None or self.alpha is None else scale * self.alpha / self.rank

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """w1 or w2 as a matrix."""
        if name in self.tensors:
            return self.tensors[name].to(dtype).flatten(1)
        up, down = self._pair(name, dtype)
        return up @ down

    def _pair(self, name: str, dtype: torch.dtype) -> Factors:
        """w1 or w2 as two matrices; a whole one with the identity on its smaller side."""
        if name in self.tensors:
            whole = self.tensors[name].to(dtype).flatten(1)
            one = torch.eye(min(whole.shape), dtype=dtype, device=whole.device)
            return Factors(one, whole) if whole.shape[0] <= whole.shape[1] else Factors(whole, one)
        a, b = self.tensors[f"{name}_a"].to(dtype), self.tensors[f"{name}_b"].to(dtype)
        core = self.tensors.get("lokr_t2") if name == "lokr_w2" else None
        return Factors(a, b) if core is None else Factors(a.T.contiguous(), unfolded(core.to(dtype), b))

    @property
    def roundings(self) -> int:
        """See `Update.roundings`."""
        rank = self.rank or 0
        return rank * sum(name in self.tensors for name in ("lokr_w1_a", "lokr_w2_a", "lokr_t2")) + 3


def _missing(parts: Parts) -> set[str]:
    """The names that must be there for w1 and w2. Raises AdapterFileError for one that is both whole and in two."""
    needed: set[str] = set()
    for name in ("lokr_w1", "lokr_w2"):
        others = [
            one for one in _NAMES if one in parts and one in (f"{name}_a", f"{name}_b", f"{name[:-2]}t{name[-1]}")
        ]
        if name in parts and others:
            raise AdapterFileError(f"both {name} and {' and '.join(others)} are there: {name} is whole or a product")
        if name not in parts:
            needed |= {f"{name}_a", f"{name}_b"} if others else {name}
    return needed


def _first_sides(parts: Parts) -> tuple[int, int]:
    """[a, c] of w1."""
    if "lokr_w1" in parts:
        return parts["lokr_w1"].shape[0], parts["lokr_w1"].shape[1]
    return parts["lokr_w1_a"].shape[0], parts["lokr_w1_b"].shape[1]


def _own_shape(parts: Parts) -> Shape:
    """The weight's, as far as the parts tell."""
    rows, columns = _first_sides(parts)
    if "lokr_w2" in parts:
        b, d, *kernel = parts["lokr_w2"].shape
    elif "lokr_t2" in parts:
        b, d, *kernel = parts["lokr_w2_a"].shape[1], parts["lokr_w2_b"].shape[1], *parts["lokr_t2"].shape[2:]
    else:
        b, d, *kernel = parts["lokr_w2_a"].shape[0], *parts["lokr_w2_b"].shape[1:]
    return (rows * b, columns * d, *kernel)


def _wanted(parts: Parts, first: tuple[int, int], second: Shape) -> dict[str, Shape]:
    """Every part's shape for w1 [a, c] and w2 [b, d, kh, kw]."""
    (a, c), (b, d, *kernel) = first, second
    first_rank = parts["lokr_w1_b"].shape[0] if "lokr_w1_b" in parts else 0
    rank = parts["lokr_w2_b"].shape[0] if "lokr_w2_b" in parts else 0
    tucker = "lokr_t2" in parts
    return {
        "lokr_w1": (a, c),
        "lokr_w1_a": (a, first_rank),
        "lokr_w1_b": (first_rank, c),
        "lokr_w2": second,
        "lokr_w2_a": (rank, b) if tucker else (b, rank),
        "lokr_w2_b": (rank, d if tucker else d * math.prod(kernel)),
        "lokr_t2": (rank, rank, *kernel),
    }
