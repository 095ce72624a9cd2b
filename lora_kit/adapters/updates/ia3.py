"""IA³: a factor per channel (Liu et al. 2022, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_kit.adapters.updates.base import Parts, Shape, Update, required
from lora_kit.adapters.updates.fitting import check_dimensions, check_names
from lora_kit.errors import AdapterFileError


@dataclass(frozen=True, eq=False)
class Ia3Update(Update):
    """ΔW = scale · weight · W along the input channels (`on_input`) or the output channels."""

    weight: Tensor
    """Linear [channels]; convolution [1, channels, 1, 1]. 0 is no change."""
    on_input: Tensor
    """0 or 1."""
    alpha: float | None = None
    """Kept if a file has one; it means nothing here."""

    method: ClassVar[str] = "ia3"
    needed: ClassVar[frozenset[str]] = frozenset({"weight", "on_input"})
    allowed: ClassVar[frozenset[str]] = needed

    @classmethod
    def from_parts(cls, parts: Parts, alpha: float | None, shape: Shape | None) -> Ia3Update:
        """See `Update.from_parts`."""
        check_names(parts, cls.needed, cls.allowed, cls.method)
        weight, on_input = parts["weight"], parts["on_input"]
        if on_input.numel() != 1 or float(on_input) not in (0.0, 1.0):
            raise AdapterFileError("on_input must be one number, 0 or 1")
        if shape is None:
            return cls(weight, on_input, alpha)
        check_dimensions(parts, shape)
        channels = shape[1] if bool(on_input) else shape[0]
        wanted = (channels,) if len(shape) == 2 else (1, channels, *(1 for _ in shape[2:]))
        if weight.numel() != channels or max(weight.shape, default=0) != channels:
            raise AdapterFileError(
                f"weight {list(weight.shape)} does not fit the {'input' if bool(on_input) else 'output'} side of the "
                f"module's weight {list(shape)}; allowed: {list(wanted)}"
            )
        return cls(weight.reshape(wanted), on_input, alpha)

    def parts(self) -> dict[str, Tensor]:
        """`weight` and `on_input`."""
        return {"weight": self.weight, "on_input": self.on_input}

    @property
    def needs_weight(self) -> bool:
        """Always."""
        return True

    def weight_delta(
        self, scale: float, weight: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        """See `Update.weight_delta`."""
        base = required(weight, self, dtype)
        kernel = (1,) * (base.ndim - 2)
        channels = (1, -1, *kernel) if bool(self.on_input) else (-1, 1, *kernel)
        return base * (self.weight.to(dtype).reshape(channels) * scale)

    @property
    def roundings(self) -> int:
        """See `Update.roundings`."""
        return 2
