"""How a LoRA pair begins. Each draw is from a seed of its own: it depends on no order, device, process or neighbour."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

_EXACT_SIDE = 1024
"""Up to this smaller side a full SVD; above it a randomised one (Halko et al. 2011): seconds instead of minutes."""
_POWER_STEPS, _OVERSAMPLING = 8, 16


class Pair(NamedTuple):
    """fp32 factors on the CPU, as matrices."""

    down: Tensor
    """[r, in·kh·kw]."""
    up: Tensor
    """[out, r]."""


def generator_of(key: str) -> torch.Generator:
    """A generator that `key` alone seeds."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def initial_pair(init: str, rank: int, weight: Tensor, scaling: float, key: str) -> Pair:
    """The pair that `init` begins with over a module's weight [out, in, …].

    scaling: alpha / rank, which PiSSA's pair is divided by. ΔW is zero, but for `pissa`, where it is the weight's
    principal part, and `orthogonal`, where it is zero to fp32's rounding.
    """
    out, inputs = weight.shape[0], weight[0].numel()
    if weight.is_meta:  # a network that is only laid out: shapes
        return Pair(torch.empty((rank, inputs), device="meta"), torch.empty((out, rank), device="meta"))
    generator = generator_of(key)
    if init == "pissa":
        return _principal(weight.detach().float().cpu().flatten(1), rank, scaling, generator)
    if init == "orthogonal":
        return _orthogonal(rank, out, inputs, generator)
    down = torch.empty((rank, inputs), dtype=torch.float32)
    if init == "gaussian":
        down.normal_(0.0, 1.0 / rank, generator=generator)  # diffusers' choice
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)  # PEFT's
    return Pair(down, torch.zeros((out, rank)))


def _orthogonal(rank: int, out: int, inputs: int, generator: torch.Generator) -> Pair:
    """PEFT's: both factors random, over two halves of an orthonormal basis, so that their product is zero."""
    basis = torch.linalg.qr(torch.randn((rank, rank), generator=generator))[0]
    odd, even = basis[0::2], basis[1::2]
    down = (torch.randn((inputs, rank // 2), generator=generator) @ odd).T / 10
    up = torch.randn((rank // 2, out), generator=generator).T @ even / 10
    return Pair(down.contiguous(), up.contiguous())


def _principal(weight: Tensor, rank: int, scaling: float, generator: torch.Generator) -> Pair:
    """PiSSA (Meng et al. 2024, equations 2 and 3): up · down · scaling is the best approximation of that rank.

    Signs are fixed, as an SVD leaves them open: each left vector's largest element is positive.
    """
    u, s, v = _svd(weight, rank, generator)
    signs = torch.gather(u, 0, u.abs().argmax(0, keepdim=True)).sign()
    u, v = u * signs, v * signs
    root = (s / scaling).sqrt()
    kept = min(rank, len(s))
    down, up = torch.zeros((rank, weight.shape[1])), torch.zeros((weight.shape[0], rank))
    down[:kept], up[:, :kept] = (v * root).T[:kept], (u * root)[:, :kept]
    return Pair(down, up)


def _svd(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """u [out, k], s [k], v [in, k] of the largest singular values."""
    wide = rank + _OVERSAMPLING
    if min(weight.shape) <= max(_EXACT_SIDE, wide):
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    basis = torch.randn((weight.shape[1], wide), generator=generator)
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis)[0])[0]
    u, s, vh = torch.linalg.svd(weight @ basis, full_matrices=False)
    return u[:, :rank], s[:rank], (basis @ vh.T)[:, :rank]
