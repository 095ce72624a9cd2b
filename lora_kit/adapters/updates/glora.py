"""GLoRA (Chavan et al. 2023), in the form of LyCORIS: a low-rank update that also turns the weight's input side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_kit.adapters.updates.base import Parts, Shape, Update, required
from lora_kit.adapters.updates.fitting import check_dimensions, check_matrices, check_names, fitted
from lora_kit.adapters.updates.tucker import unfolded

_MATRICES = ("a1", "a2", "b1", "b2")


@dataclass(frozen=True, eq=False)
class GloraUpdate(Update):
    """ΔW = scale · (alpha / rank) · (W · a1 · a2 + b1 · b2).

    LyCORIS before 3 has the names of each pair the other way round (its a2 is this a1); such files are told by their
    shapes, and read into this order.
    """

    a1: Tensor
    """[in, r, …]."""
    a2: Tensor
    """[r, in, …]."""
    b1: Tensor
    """[out, r, …]."""
    b2: Tensor
    """[r, in, kh, kw]; with a core [r, in, 1, 1]."""
    alpha: float | None = None
    """None: the rank."""
    core: Tensor | None = None
    """`bm`, the Tucker core [r, r, kh, kw] between b1 and b2."""

    method: ClassVar[str] = "glora"
    needed: ClassVar[frozenset[str]] = frozenset(_MATRICES)
    allowed: ClassVar[frozenset[str]] = frozenset({*_MATRICES, "bm"})

    @classmethod
    def from_parts(cls, parts: Parts, alpha: float | None, shape: Shape | None) -> GloraUpdate:
        """See `Update.from_parts`."""
        check_names(parts, cls.needed, cls.allowed, cls.method)
        check_matrices(parts, (*_MATRICES, "bm"))
        if _is_turned(parts, shape):
            parts = {**parts, "a1": parts["a2"], "a2": parts["a1"], "b1": parts["b2"], "b2": parts["b1"]}
        rank = parts["a2"].shape[0]
        kernel_part = parts.get("bm", parts["b2"])
        full = shape or (parts["b1"].shape[0], parts["b2"].shape[1], *kernel_part.shape[2:])
        check_dimensions(parts, full)
        out, inner, *kernel = full
        ones = [1] * len(kernel)
        wanted: dict[str, Shape] = {
            "a1": (inner, rank, *ones),
            "a2": (rank, inner, *ones),
            "b1": (out, rank, *ones),
            "b2": (rank, inner, *(ones if "bm" in parts else kernel)),
            "bm": (rank, rank, *kernel),
        }
        found = fitted(parts, wanted, shape)
        return cls(found["a1"], found["a2"], found["b1"], found["b2"], alpha, found.get("bm"))

    def parts(self) -> dict[str, Tensor]:
        """The four matrices, and `bm` if there is one."""
        own = {"a1": self.a1, "a2": self.a2, "b1": self.b1, "b2": self.b2}
        return own if self.core is None else own | {"bm": self.core}

    @property
    def needs_weight(self) -> bool:
        """Always."""
        return True

    @property
    def rank(self) -> int:
        """Of each pair."""
        return self.a2.shape[0]

    def weight_delta(
        self, scale: float, weight: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        """See `Update.weight_delta`."""
        base = required(weight, self, dtype)
        a1, a2, b1, b2 = (part.to(dtype).flatten(1) for part in (self.a1, self.a2, self.b1, self.b2))
        turned = torch.einsum("oi...,ir->or...", base, a1)
        turned = torch.einsum("or...,ri->oi...", turned, a2)
        own = b1 @ (b2 if self.core is None else unfolded(self.core.to(dtype), b2))
        alpha = self.rank if self.alpha is None else self.alpha
        return (turned + own.reshape(base.shape)) * (scale * alpha / self.rank)

    @property
    def roundings(self) -> int:
        """See `Update.roundings`."""
        return self.a1.shape[0] + 2 * self.rank + 4


def _is_turned(parts: Parts, shape: Shape | None) -> bool:
    """Whether the names are in the order of LyCORIS before 3: a1 [r, in], a2 [in, r], b1 [r, in], b2 [out, r]."""
    a1, b1, b2 = parts["a1"], parts["b1"], parts["b2"]
    if shape is None:
        return a1.shape[0] < a1.shape[1]
    out, inner = shape[0], shape[1] if len(shape) > 1 else 0
    as_now = a1.shape[0] == inner and b1.shape[0] == out and b2.shape[1] == inner
    return not as_now and a1.shape[1] == inner and b2.shape[0] == out and b1.shape[1] == inner
