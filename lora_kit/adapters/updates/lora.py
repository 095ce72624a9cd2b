"""LoRA: ΔW = scale · (alpha / rank) · up · down (Hu et al. 2021, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_kit.adapters.updates.base import Factors, Parts, Shape, Update, check_names, reshaped
from lora_kit.errors import AdapterFileError


@dataclass(frozen=True, eq=False)
class LoraUpdate(Update):
    """A pair of factors."""

    down: Tensor
    """Linear [r, in]; convolution [r, in, kh, kw]."""
    up: Tensor
    """Linear [out, r]; convolution [out, r, 1, 1]."""
    alpha: float
    mid: Tensor | None = None
    magnitude: Tensor | None = None

    method: ClassVar[str] = "lora"
    needed: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    allowed: ClassVar[frozenset[str]] = needed

    @classmethod
    def from_parts(cls, parts: Parts, alpha: float | None, shape: Shape | None) -> LoraUpdate:
        """See `Update.from_parts`. A missing alpha is the rank."""
        check_names(parts, cls.needed, cls.allowed, cls.method)
        down, up = parts["down"], parts["up"]
        rank = down.shape[0] if down.ndim else 0
        if shape is None:
            shape = (up.shape[0] if up.ndim else 0, *down.shape[1:])
        out, inner = shape[0], shape[1:]
        kernel = (1,) * len(shape[2:])
        fitted = reshaped(down, (rank, *inner)), reshaped(up, (out, rank, *kernel))
        if rank == 0 or fitted[0] is None or fitted[1] is None:
            raise AdapterFileError(
                f"down {list(down.shape)} and up {list(up.shape)} do not fit the module's weight {list(shape)}; "
                f"allowed: [r, {', '.join(map(str, inner))}] and [{out}, r{', 1' * len(kernel)}]"
            )
        return cls(fitted[0], fitted[1], float(rank) if alpha is None else alpha)

    def parts(self) -> dict[str, Tensor]:
        """`down` and `up`."""
        return {"down": self.down, "up": self.up}

    @property
    def rank(self) -> int:
        """Of the factors."""
        return self.down.shape[0]

    def factors(self, dtype: torch.dtype = torch.float32) -> Factors | None:
        """The pair as matrices."""
        return Factors(self.up.to(dtype).flatten(1) * (self.alpha / self.rank), self.down.to(dtype).flatten(1))

    def weight_delta(
        self, scale: float, weight: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        """See `Update.weight_delta`."""
        up = self.up.to(dtype).flatten(1) * (scale * self.alpha / self.rank)
        return (up @ self.down.to(dtype).flatten(1)).reshape(self.up.shape[0], *self.down.shape[1:])
