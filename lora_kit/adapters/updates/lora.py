"""LoRA (Hu et al. 2021, section 4.1), LoCon with a Tucker core, and DoRA over both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_kit.adapters.updates.base import Factors, Parts, Shape
from lora_kit.adapters.updates.dora import Decomposable, fitted_magnitude
from lora_kit.adapters.updates.fitting import check_dimensions, check_matrices, check_names, fitted
from lora_kit.adapters.updates.full import fitted_bias
from lora_kit.adapters.updates.tucker import unfolded


@dataclass(frozen=True, eq=False)
class LoraUpdate(Decomposable):
    """ΔW = scale · (alpha / rank) · up · down; with a core, up · mid · down."""

    down: Tensor
    """Linear [r, in]; convolution [r, in, kh, kw], with a core [r, in, 1, 1]."""
    up: Tensor
    """Linear [out, r]; convolution [out, r, 1, 1]."""
    alpha: float  # pyright: ignore[reportIncompatibleVariableOverride] - frozen, so it may be narrower
    mid: Tensor | None = None
    """The Tucker core [r, r, kh, kw]."""
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    """Δbias [out], which ComfyUI writes beside a LoRA as `diff_b`."""

    method: ClassVar[str] = "lora"
    needed: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    allowed: ClassVar[frozenset[str]] = frozenset({"down", "up", "mid", "magnitude", "diff_b"})

    @classmethod
    def from_parts(cls, parts: Parts, alpha: float | None, shape: Shape | None) -> LoraUpdate:
        """See `Update.from_parts`. A missing alpha is the rank."""
        check_names(parts, cls.needed, cls.allowed, cls.method)
        check_matrices(parts, ("down", "up", "mid"))
        down, up, mid = parts["down"], parts["up"], parts.get("mid")
        rank = down.shape[0]
        full = shape or (up.shape[0], down.shape[1], *(down if mid is None else mid).shape[2:])
        check_dimensions(parts, full)
        out, inner, *kernel = full
        ones = [1] * len(kernel)
        wanted: dict[str, Shape] = {
            "down": (rank, inner, *(kernel if mid is None else ones)),
            "up": (out, rank, *ones),
            "mid": (rank, rank, *kernel),
        }
        found = fitted(parts, wanted, shape)
        return cls(
            found["down"],
            found["up"],
            float(rank) if alpha is None else alpha,
            found.get("mid"),
            fitted_magnitude(parts.get("magnitude"), full),
            fitted_bias(parts.get("diff_b"), out),
        )

    def parts(self) -> dict[str, Tensor]:
        """`down`, `up` and what there is of `mid`, `magnitude` and `diff_b`."""
        optional = {"mid": self.mid, "magnitude": self.magnitude, "diff_b": self.bias}
        return {"down": self.down, "up": self.up} | {name: part for name, part in optional.items() if part is not None}

    @property
    def rank(self) -> int:
        """Of the factors."""
        return self.down.shape[0]

    def factors(self, dtype: torch.dtype = torch.float32) -> Factors | None:
        """The pair as matrices, a core multiplied into `down`; None with a magnitude."""
        return None if self.magnitude is not None else self._pair(1.0, dtype)

    def product(self, scale: float, dtype: torch.dtype) -> Tensor:
        """See `Decomposable.product`."""
        up, down = self._pair(scale, dtype)
        kernel = (self.down if self.mid is None else self.mid).shape[2:]
        return (up @ down).reshape(self.up.shape[0], self.down.shape[1], *kernel)

    def _pair(self, scale: float, dtype: torch.dtype) -> Factors:
        up = self.up.to(dtype).flatten(1) * (scale * self.alpha / self.rank)
        down = self.down.to(dtype).flatten(1)
        return Factors(up, down if self.mid is None else unfolded(self.mid.to(dtype), down))

    def bias_delta(self, scale: float, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """See `Update.bias_delta`."""
        return None if self.bias is None else self.bias.to(dtype) * scale

    @property
    def roundings(self) -> int:
        """See `Update.roundings`."""
        return self.rank * (1 if self.mid is None else 2) + 3
