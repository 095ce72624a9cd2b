"""Updates kept below a Frobenius norm (`max_norm` of a rule; sd-scripts' `scale_weight_norms`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kit.targeting import Target, TargetPlan


class Limited(NamedTuple):
    """One module with a limit."""

    target: Target
    parameters: Sequence[nn.Parameter]
    """In the order of `Target.shapes`."""


class NormReport(NamedTuple):
    """What `limit_norms` found, as tensors: reading them waits for the device."""

    scaled: Tensor
    """How many modules were scaled down."""
    mean: Tensor
    """Mean norm before, over the modules with a limit."""


def limited_modules(plan: TargetPlan, trainable: Mapping[str, Sequence[nn.Parameter]]) -> list[Limited]:
    """The plan's modules that have a limit."""
    return [Limited(target, trainable[target.module.name]) for target in plan.targets if target.max_norm is not None]


@torch.no_grad()
def limit_norms(modules: Sequence[Limited], held: Tensor | None = None) -> NormReport | None:
    """Scale every update that is above its limit down to it: each of its k factors by (limit / norm)^(1/k).

    None if there are no modules. To be called after each optimizer step. held: a bool on the weights' device; where it
    is true nothing is scaled, since there was no update.
    """
    if not modules:
        return None
    norms, over = [], []
    for target, parameters in modules:
        assert target.max_norm is not None
        named = dict(zip(target.shapes, parameters, strict=True))
        norm = update_norm(named, target.effective_alpha / target.rank if target.rank else 1.0)
        ratio = (target.max_norm / norm.clamp_min(1e-30)).clamp_max(1.0)
        if held is not None:
            ratio = ratio.masked_fill(held, 1.0)  # x · 1 is x, bit for bit
        factors = [parameter for part, parameter in named.items() if not part.endswith(("diff_b", "b_norm"))]
        for parameter in factors:
            parameter.mul_(ratio ** (1 / len(factors)))
        norms.append(norm)
        over.append(norm > target.max_norm)
    return NormReport(torch.stack(over).sum(), torch.stack(norms).mean())


def update_norm(parts: Mapping[str, Tensor], scaling: float) -> Tensor:
    """‖ΔW‖ in fp32, from the factors where that needs no ΔW: ‖up · down‖² = Σ (upᵀup ∘ down downᵀ), and a Kronecker
    product's is the product of the two. scaling: alpha / rank."""
    if "down" in parts:
        return _product_norm(parts["up"], parts["down"]) * scaling
    if "hada_w1_a" in parts:
        halves = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        return halves.norm() * scaling
    if "lokr_w2" in parts:
        return parts["lokr_w1"].norm() * parts["lokr_w2"].norm()
    if "lokr_w1" in parts:
        return parts["lokr_w1"].norm() * _product_norm(parts["lokr_w2_a"], parts["lokr_w2_b"]) * scaling
    return next(part for name, part in parts.items() if name in ("diff", "w_norm")).norm()


def _product_norm(up: Tensor, down: Tensor) -> Tensor:
    up, down = up.flatten(1).float(), down.flatten(1).float()
    return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0.0).sqrt()
