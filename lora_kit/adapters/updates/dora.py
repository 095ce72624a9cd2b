"""Weight decomposition (DoRA, Liu et al. 2024, equation 5) over any method that makes a ΔW of its own."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lora_kit.adapters.updates.base import FP32_ROUNDING, Shape, Update, required
from lora_kit.adapters.updates.fitting import reshaped
from lora_kit.errors import AdapterFileError

NORM_FLOOR = torch.finfo(torch.float32).eps
"""Added to the norm, as LyCORIS ≥ 3 does against a division by zero (2.2 adds nothing)."""


class Decomposable(Update):
    """A method with an optional magnitude (LyCORIS's `dora_scale`).

    With D = ΔW at strength 1, n = ‖W + D‖ per output row (or per input column, as LyCORIS before 3.2 and its
    `wd_on_output=False` have it) and m the magnitude: W' = (W + D) · (1 + scale · (m / n - 1)). So a strength other
    than 1 scales only the magnitude's correction: LyCORIS ≥ 3 (`apply_weight_decompose`); 2.2 knows strength 1 alone.
    ComfyUI instead goes a straight way from W to W' at strength 1, and PEFT scales D inside the norm; all agree at 1.
    """

    magnitude: Tensor | None
    """[out, 1, …] or [1, in, …]."""

    @abstractmethod
    def product(self, scale: float, dtype: torch.dtype) -> Tensor:
        """`scale` times ΔW without the magnitude, in the weight's shape."""

    @property
    def needs_weight(self) -> bool:
        """With a magnitude."""
        return self.magnitude is not None

    def weight_delta(
        self, scale: float, weight: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        """See `Update.weight_delta`."""
        if self.magnitude is None:
            return self.product(scale, dtype)
        base = required(weight, self, dtype)
        if scale == 0:
            return torch.zeros_like(base)
        delta = self.product(1.0, dtype).reshape(base.shape)
        # The same as W' - W, but without the cancellation.
        return delta + (base + delta) * (scale * (self._ratio(base + delta) - 1)).to(dtype)

    def _ratio(self, weight: Tensor) -> Tensor:
        """m / n in float64 (it costs little, and is rounded but once)."""
        assert self.magnitude is not None
        axis = norm_axis(self.magnitude, tuple(weight.shape))
        others = tuple(dim for dim in range(weight.ndim) if dim != axis)
        # Detached: a constant to the gradient while it trains (Liu et al. 2024, section 4.3).
        norm = torch.linalg.vector_norm(weight.detach(), dim=others, keepdim=True, dtype=torch.float64)
        magnitude = self.magnitude.to(weight.device, torch.float64).reshape(norm.shape)
        return magnitude / (norm + NORM_FLOOR)

    def rounding(self, scale: float, weight: Tensor | None = None) -> Tensor:
        """See `Update.rounding`. The norm moves by at most the norm of what its elements are off by."""
        if self.magnitude is None:
            return super().rounding(scale, weight)
        base = required(weight, self, torch.float64)
        delta = self.product(1.0, torch.float64).reshape(base.shape)
        merged, ratio = base + delta, self._ratio(base + delta)
        plain = self._absolute().product(1.0, torch.float64).reshape(base.shape)
        off = (self.roundings + 1) * FP32_ROUNDING * plain + FP32_ROUNDING * merged.abs()
        axis = norm_axis(self.magnitude, tuple(base.shape))
        others = tuple(dim for dim in range(base.ndim) if dim != axis)
        norms = [torch.linalg.vector_norm(one, dim=others, keepdim=True) for one in (off, merged)]
        correction = abs(scale) * (ratio - 1).abs()
        of_ratio = abs(scale) * ratio * norms[0] / (norms[1] + NORM_FLOOR) + FP32_ROUNDING * correction
        last = FP32_ROUNDING * (2 * merged.abs() * correction + (delta + merged * scale * (ratio - 1)).abs())
        # Twice the first-order terms, for the second-order ones.
        return 2 * (off + off * correction + merged.abs() * of_ratio + last)


def norm_axis(magnitude: Tensor, shape: Shape) -> int:
    """0 for a norm of each output row, 1 of each input column."""
    return 0 if magnitude.shape[0] == shape[0] and magnitude.numel() == shape[0] else 1


def fitted_magnitude(magnitude: Tensor | None, shape: Shape | None) -> Tensor | None:
    """[out, 1, …] or [1, in, …] for a weight of `shape`. Raises AdapterFileError if it is neither."""
    if magnitude is None or shape is None:
        return magnitude
    out, inner, *kernel = shape
    rows, columns = (out, 1, *(1 for _ in kernel)), (1, inner, *(1 for _ in kernel))
    if magnitude.shape == (out,):  # PEFT's, for a linear
        return magnitude.reshape(rows)
    for wanted in (rows, columns):
        found = reshaped(magnitude, wanted)
        if found is not None:
            return found
    raise AdapterFileError(
        f"the magnitude (dora_scale) {list(magnitude.shape)} does not fit the module's weight {list(shape)}; "
        f"allowed: {list(rows)} and {list(columns)}"
    )
