"""OFT and BOFT: orthogonal blocks that turn the weight's output side.

A block is R = (I + Q)(I - Q)⁻¹ with Q = B - Bᵀ skew (Cayley's transform; Qiu et al. 2023, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_kit.adapters.updates.base import FP32_ROUNDING, Parts, Shape, Update, required
from lora_kit.adapters.updates.fitting import check_dimensions, check_names, fitted
from lora_kit.errors import AdapterFileError


class _Orthogonal(Update):
    """What the two have in common."""

    blocks: Tensor
    rescale: Tensor | None
    alpha: float | None
    needed: ClassVar[frozenset[str]] = frozenset({"oft_blocks"})
    allowed: ClassVar[frozenset[str]] = frozenset({"oft_blocks", "rescale"})

    def parts(self) -> dict[str, Tensor]:
        """`oft_blocks`, and `rescale` if there is one."""
        return {"oft_blocks": self.blocks} | ({} if self.rescale is None else {"rescale": self.rescale})

    @property
    def needs_weight(self) -> bool:
        """Always."""
        return True

    def rotations(self, scale: float) -> Tensor:
        """scale · (R - I) of every block, in float64: the blocks are small, and so R costs no accuracy.

        alpha is the constraint: ‖Q‖ (Frobenius, over all blocks) is at most alpha · out (COFT's; 0: none).
        """
        blocks = self.blocks.double()
        skew = blocks - blocks.transpose(-1, -2)
        limit = (self.alpha or 0.0) * self.blocks.shape[-3] * self.blocks.shape[-1]
        if limit > 0:
            norm = skew.detach().norm() + 1e-8
            skew = skew * (limit / norm).clamp(max=1.0)
        one = torch.eye(blocks.shape[-1], dtype=torch.float64, device=blocks.device)
        # R - I = 2Q(I - Q)⁻¹; both factors commute, so a solve from the left gives the same.
        # I - Q is never singular; `solve` would wait for the device to hear that.
        return 2 * scale * torch.linalg.solve_ex(one - skew, skew).result

    def weight_delta(
        self, scale: float, weight: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        """See `Update.weight_delta`. `rescale` acts whole at every strength but 0, as in LyCORIS."""
        base = required(weight, self, dtype)
        if scale == 0:
            return torch.zeros_like(base)
        delta = self.turned(base, self.rotations(scale).to(dtype))
        if self.rescale is None:
            return delta
        rescale = self.rescale.to(dtype).reshape(-1, *(1 for _ in base.shape[1:]))
        return rescale * delta + (rescale - 1) * base

    def turned(self, weight: Tensor, rotations: Tensor) -> Tensor:
        """ΔW without `rescale`, from the blocks' s(R - I)."""
        raise NotImplementedError

    def rounding(self, scale: float, weight: Tensor | None = None) -> Tensor:
        """See `Update.rounding`."""
        base = required(weight, self, torch.float64).abs()
        turned = self.turned_magnitude(base, self.rotations(scale).abs())
        if self.rescale is not None:
            rescale = self.rescale.double().reshape(-1, *(1 for _ in base.shape[1:]))
            turned = rescale.abs() * turned + (rescale.abs() + 1) * base
        return (self.roundings + 1) * FP32_ROUNDING * turned

    def turned_magnitude(self, weight: Tensor, rotations: Tensor) -> Tensor:
        """`turned` with absolute values, and every difference a sum."""
        return self.turned(weight, rotations)


@dataclass(frozen=True, eq=False)
class OftUpdate(_Orthogonal):
    """W' = rescale · (I + scale · (Rᵀ - I)) W, R block-diagonal (LyCORIS's `diag-oft`)."""

    blocks: Tensor
    """[blocks, b, b], blocks · b = out."""
    rescale: Tensor | None = None
    """[out, 1, …]."""
    alpha: float | None = None
    """The constraint; None or 0: there is none."""

    method: ClassVar[str] = "oft"

    @classmethod
    def from_parts(cls, parts: Parts, alpha: float | None, shape: Shape | None) -> OftUpdate:
        """See `Update.from_parts`."""
        blocks, rescale = _fitted_blocks(parts, shape, cls)
        return cls(blocks, rescale, alpha)

    def turned(self, weight: Tensor, rotations: Tensor) -> Tensor:
        """See `_Orthogonal.turned`."""
        count, size, _ = self.blocks.shape
        return torch.bmm(rotations.transpose(1, 2), weight.reshape(count, size, -1)).reshape(weight.shape)

    @property
    def roundings(self) -> int:
        """See `Update.roundings`."""
        return self.blocks.shape[-1] + 4


@dataclass(frozen=True, eq=False)
class BoftUpdate(_Orthogonal):
    """W' = rescale · Bₘ … B₁ W, stage i a butterfly of blocks I + scale · (Rᵢ - I) (Liu et al. 2024, equation 5).

    A strength moves every stage towards the identity, as in LyCORIS 3.1.1 and 4.1.3; 2.2 moved the first alone. Its
    version 3.1.1 turned the weight's input side in merges; 4.1.3 turns the output side.
    """

    blocks: Tensor
    """[stages, blocks, b, b], blocks · b = out."""
    rescale: Tensor | None = None
    """[out, 1, …]."""
    alpha: float | None = None
    """The constraint; None or 0: there is none."""

    method: ClassVar[str] = "boft"

    @classmethod
    def from_parts(cls, parts: Parts, alpha: float | None, shape: Shape | None) -> BoftUpdate:
        """See `Update.from_parts`."""
        blocks, rescale = _fitted_blocks(parts, shape, cls)
        stages, count, size, _ = blocks.shape
        if size % 2 or count % 2 ** (stages - 1):
            raise AdapterFileError(
                f"oft_blocks {list(blocks.shape)} make no butterfly: the blocks' side must be even, and their number "
                f"divisible by 2^(stages - 1) = {2 ** (stages - 1)}"
            )
        return cls(blocks, rescale, alpha)

    def turned(self, weight: Tensor, rotations: Tensor) -> Tensor:
        """See `_Orthogonal.turned`. Each stage adds its own change, so that small turns do not cancel."""
        change = torch.zeros_like(weight)
        for index, stage in enumerate(rotations):
            change = change + self._stage(weight + change, stage, index)
        return change

    def turned_magnitude(self, weight: Tensor, rotations: Tensor) -> Tensor:
        """See `_Orthogonal.turned_magnitude`."""
        return self.turned(weight, rotations) + weight

    def _stage(self, weight: Tensor, rotations: Tensor, index: int) -> Tensor:
        """The blocks' product with rows that are brought together from a distance of 2^index · b / 2."""
        count, size, _ = rotations.shape
        far = 2**index * size // 2
        rows = weight.reshape(weight.shape[0] // (2 * far), 2, far, -1).transpose(1, 2)
        mixed = torch.bmm(rotations, rows.reshape(count, size, -1))
        return mixed.reshape(rows.shape).transpose(1, 2).reshape(weight.shape)

    @property
    def roundings(self) -> int:
        """See `Update.roundings`."""
        return self.blocks.shape[0] * (self.blocks.shape[-1] + 3) + 4


def _fitted_blocks(parts: Parts, shape: Shape | None, kind: type[_Orthogonal]) -> tuple[Tensor, Tensor | None]:
    """`oft_blocks` and `rescale`, checked."""
    check_names(parts, kind.needed, kind.allowed, kind.method)
    blocks = parts["oft_blocks"]
    if blocks.ndim not in (3, 4):
        raise AdapterFileError(f"oft_blocks {list(blocks.shape)}: allowed are [blocks, b, b], [stages, blocks, b, b]")
    size = blocks.shape[-1]
    out = shape[0] if shape else blocks.shape[-3] * size
    if shape:
        check_dimensions(parts, shape)
    if 0 in blocks.shape or blocks.shape[-2] != size or blocks.shape[-3] * size != out:
        raise AdapterFileError(
            f"oft_blocks {list(blocks.shape)} do not fit the module's weight {list(shape or ())}; allowed: "
            f"{'[stages, blocks, b, b]' if blocks.ndim == 4 else '[blocks, b, b]'} with blocks · b = {out}"
        )
    if "rescale" not in parts:
        return blocks, None
    return blocks, _fitted_rescale(parts, out, shape)


def _fitted_rescale(parts: Parts, out: int, shape: Shape | None) -> Tensor:
    own = parts["rescale"].shape if shape is None else (out, *(1 for _ in shape[1:]))
    wanted: Mapping[str, Shape] = {"rescale": (out, *own[1:])}
    return fitted(parts, wanted, shape)["rescale"]
