"""W + ΔW for one stored parameter, in blocks that stay in the processor's cache, with a single cast.

A merge moves far more bytes than it computes: for rank 16 the product costs 32 operations a weight, and a dense ΔW of
a whole layer would be written to memory and read again. Here a block of some rows is widened, gets its share of
up · down added in place (beta = 1 in the matrix product), is checked and cast, and leaves, all while it is hot.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters.updates import Update
from lora_kit.errors import ModelError
from lora_kit.merging.delta import ScaledUpdate
from lora_kit.merging.stored import dtype_name

BLOCK = 1 << 18
"""Values in a block: 1 MiB in fp32, about what a core's second-level cache holds."""


class Part(NamedTuple):
    """Some rows of a stored tensor (all of them, unless it is packed) and what is added to them."""

    module: str
    kind: Literal["weight", "bias"]
    start: int
    stop: int
    shape: tuple[int, ...]
    """Of the module's parameter: linear [out, in], convolution [out, in, kh, kw], norm or bias [n]."""
    updates: tuple[ScaledUpdate, ...]


class Delta(NamedTuple):
    """ΔW = up · down + dense; either may be missing."""

    up: Tensor | None
    """[rows, ranks], scales folded in."""
    down: Tensor | None
    """[ranks, columns]."""
    dense: Tensor | None
    """[rows, columns]."""


_scratch = threading.local()
_whole = threading.Lock()


def working_dtype(stored: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for weights that are stored so."""
    return torch.float64 if stored == torch.float64 else torch.float32


def matrix(tensor: Tensor) -> Tensor:
    """[out, in · kh · kw] of a weight, [n, 1] of a vector; a view."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim else tensor.reshape(1, 1)


def delta(part: Part | None, base: Tensor, dtype: torch.dtype) -> Delta:
    """What `part.updates` add to `base` (its rows as stored, [rows, columns]), computed in `dtype`.

    Exact low-rank updates stand side by side in one product. Every update that depends on the weight sees the
    original one, so that the order of adapters does not matter.
    """
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    dense: Tensor | None = None
    for update, scale in part.updates if part else ():
        assert part is not None
        factors = update.factors(dtype) if part.kind == "weight" else None
        if factors is not None:
            ups.append(factors[0] * scale)
            downs.append(factors[1])
            continue
        full = _full(part, update, scale, base, dtype)
        dense = full if dense is None or full is None else dense + full
    if not ups:
        return Delta(None, None, dense)
    return Delta(torch.cat(ups, dim=1), torch.cat(downs), dense)


def _full(part: Part, update: Update, scale: float, base: Tensor, dtype: torch.dtype) -> Tensor | None:
    """ΔW as a whole. One thread at a time: a method's own arithmetic may hold several copies of a large weight."""
    with _whole:
        original = base.to(dtype).reshape(part.shape) if update.needs_weight else None
        found = (update.weight_delta if part.kind == "weight" else update.bias_delta)(scale, original, dtype)
        return None if found is None else matrix(found.reshape(part.shape))


def blocks(base: Tensor, change: Delta, dtype: torch.dtype, key: str) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows of W + ΔW in `dtype`) for `base` [rows, columns], computed in `working_dtype`.

    The block handed out is overwritten by the next one. Raises ModelError where a sum is not finite, or a value does
    not fit into `dtype`.
    """
    working = working_dtype(base.dtype)
    rows, columns = base.shape
    step = max(1, BLOCK // max(columns, 1))
    for start in range(0, rows, step):
        stored = base[start : start + step]
        exact = _buffer("exact", stored, working).copy_(stored)
        if change.up is not None and change.down is not None:
            exact.addmm_(change.up[start : start + step], change.down)
        if change.dense is not None:
            exact += change.dense[start : start + step]
        _check(exact, dtype, key, change.up is not None or change.dense is not None)
        yield start, exact if dtype == working else _buffer("cast", stored, dtype).copy_(exact)


def _buffer(name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """This thread's own buffer in the shape of `like`: fresh memory would be paged in for every block."""
    buffers: dict[tuple[str, torch.dtype], Tensor] = _scratch.__dict__.setdefault("buffers", {})
    count = like.numel()
    if (name, dtype) not in buffers or buffers[name, dtype].numel() < count:
        buffers[name, dtype] = torch.empty(max(count, BLOCK), dtype=dtype)
    return buffers[name, dtype][:count].view(like.shape)


def _check(exact: Tensor, dtype: torch.dtype, key: str, changes: bool) -> None:
    """Raise ModelError for what does not fit. What is merely cast may hold infinities: OpenCLIP's mask does."""
    if not exact.numel():
        return
    extremes = torch.stack(torch.aminmax(exact))  # a NaN anywhere makes both NaN
    if bool(torch.isfinite(extremes.to(dtype)).all()):
        return
    finite = torch.isfinite(exact)
    if changes and not bool(finite.all()):
        raise ModelError(f"{key}: the result holds NaN or infinite values, so the base or an adapter is broken.")
    lost = finite & ~torch.isfinite(exact.to(dtype))
    if bool(lost.any()):
        largest = float(exact[lost].abs().max())
        raise ModelError(
            f"{key}: its value {largest:.4g} does not fit into {dtype_name(dtype)}. Use --dtype bf16 or fp32."
        )
