"""The tensors of one module's update while it trains, in the very form that its file has."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from lora_kit.adapters.inits import generator_of, initial_pair
from lora_kit.adapters.updates import LoraUpdate, Update
from lora_kit.adapters.updates.build import METHODS
from lora_kit.adapters.updates.dora import NORM_FLOOR
from lora_kit.targeting import Target, canonical_name

_HADAMARD = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
"""Standard deviations, as LyCORIS and PEFT begin: the second product is zero, so ΔW is."""
_ZERO = ("lokr_w2_b", "lokr_w2", "oft_blocks", "diff", "diff_b", "w_norm", "b_norm")


class TrainedParts(nn.Module):
    """fp32 parameters by their neutral names, and the `Update` that they make.

    What is trained is the `weight_delta` that files and merges have, so that nothing is translated afterwards. DoRA's
    norm is a constant to the gradient (Liu et al. 2024, section 4.3), as in PEFT.
    """

    def __init__(self, target: Target, weight: Tensor, seed: int) -> None:
        """weight: the module's own; the parts lie on its device. ΔW is zero at first: exactly, but for DoRA, whose
        magnitude is rounded to fp32. Drawn from (seed, module name, part) alone."""
        super().__init__()
        name = canonical_name(target.module.name)
        pair = _pair(target, weight, seed) if "down" in target.shapes else {}
        for part, shape in target.shapes.items():
            drawn = (
                pair[part].reshape(shape) if part in pair else _initial(part, shape, weight, f"{seed}:{name}:{part}")
            )
            self.register_parameter(part, nn.Parameter(drawn.to(weight.device)))
        self.alpha = target.effective_alpha if target.alpha else None
        self.shape = tuple(target.module.shape)
        self.dropout = target.dropout
        self.rank_dropout, self.module_dropout = target.rank_dropout, target.module_dropout
        self.begun: dict[str, Tensor] = {}
        """What is taken away of ΔW: PiSSA's factors as they began. Derived from the weight, so in no checkpoint."""
        if target.init == "pissa":
            self.begun = {part: own.detach().clone() for part, own in self.named_parameters()}

    def update(self) -> Update:
        """The update of the parameters as they are, with their graph; PiSSA's without what is taken away."""
        return self._made(cast("dict[str, Tensor]", dict(self.named_parameters())))

    def taken_away(self) -> Update | None:
        """What PiSSA subtracts."""
        return self._made(self.begun) if self.begun else None

    def copied(self) -> Update:
        """The update as an fp32 copy on the CPU. PiSSA's has twice the rank: up · down - up₀ · down₀ in one pair."""
        parts = {
            name: part.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, part in self.named_parameters()
        }
        if not self.begun:
            return self._made(parts)
        assert self.alpha is not None
        down = torch.cat([parts["down"], self.begun["down"].cpu()])
        up = torch.cat([parts["up"], -self.begun["up"].cpu()], dim=1)
        return LoraUpdate(down, up, 2 * self.alpha)

    def _made(self, parts: dict[str, Tensor]) -> Update:
        method = next(kind for kind in METHODS if _is_of(kind, parts))
        return method.from_parts(parts, self.alpha, self.shape)


def _pair(target: Target, weight: Tensor, seed: int) -> dict[str, Tensor]:
    key = f"{seed}:{canonical_name(target.module.name)}"
    pair = initial_pair(target.init, target.rank, weight, target.effective_alpha / target.rank, key)
    return {"down": pair.down, "up": pair.up}


def _is_of(kind: type[Update], parts: dict[str, Tensor]) -> bool:
    blocks = parts.get("oft_blocks")
    if blocks is not None:
        return kind.method == ("boft" if blocks.ndim == 4 else "oft")
    return parts.keys() <= kind.allowed and kind.needed <= parts.keys()


def _initial(part: str, shape: tuple[int, ...], weight: Tensor, key: str) -> Tensor:
    """fp32, on the CPU: Kaiming-uniform with a = √5 (PEFT's and LyCORIS's) where nothing else is said."""
    if weight.is_meta:  # a network that is only laid out: shapes
        return torch.empty(shape, device="meta")
    if part in _ZERO:
        return torch.zeros(shape)
    if part == "magnitude":
        others = tuple(range(1, weight.ndim))
        norm = torch.linalg.vector_norm(weight.detach(), dim=others, keepdim=True, dtype=torch.float64)
        return (norm + NORM_FLOOR).to("cpu", torch.float32)
    generator = generator_of(key)
    drawn = torch.empty(shape, dtype=torch.float32)
    if part in _HADAMARD:
        deviation = _HADAMARD[part]
        return drawn.normal_(0.0, deviation, generator=generator) if deviation else torch.zeros(shape)
    return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
