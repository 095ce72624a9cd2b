"""Which tensors a method trains over one module, and their shapes: pure arithmetic, for plans and for the layers."""

from __future__ import annotations

import math
from typing import NamedTuple

from lora_kit.errors import TargetError
from lora_kit.targeting.modules import ModuleInfo

Shape = tuple[int, ...]


class Settings(NamedTuple):
    """What of a rule the shapes depend on."""

    rank: int = 0
    factor: int | None = None
    block_size: int = 0
    stages: int = 0
    only: str = "all"


def part_shapes(method: str, module: ModuleInfo, settings: Settings) -> dict[str, Shape]:
    """Neutral part name → shape, as `lora_kit.adapters.updates` has them; `full` has the module's own.

    Raises TargetError, naming the module, if its sides allow no such update.
    """
    shape = tuple(module.shape)
    match method:
        case "lora" | "rslora":
            return _pair(shape, settings.rank)
        case "dora":
            return _pair(shape, settings.rank) | {"magnitude": (shape[0], *(1 for _ in shape[1:]))}
        case "loha":
            out, inputs = shape[0], math.prod(shape[1:])
            up, down = (out, settings.rank), (settings.rank, inputs)
            return {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down}
        case "lokr":
            return _kronecker(shape, settings.rank, settings.factor)
        case "oft":
            size = largest_divisor(shape[0], settings.block_size)
            return {"oft_blocks": (shape[0] // _turning(size, module, settings), size, size)}
        case "boft":
            return {"oft_blocks": _butterfly(module, settings)}
        case _:
            return _own(module, settings.only if method == "diff" else "all")


def has_bias(module: ModuleInfo) -> bool:
    """Whether the module has more parameters than its weight."""
    return module.parameters > math.prod(module.shape)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def _pair(shape: Shape, rank: int) -> dict[str, Shape]:
    out, *inputs = shape
    return {"down": (rank, *inputs), "up": (out, rank, *(1 for _ in inputs[1:]))}


def _kronecker(shape: Shape, rank: int, factor: int | None) -> dict[str, Shape]:
    """w1 [a, c] ⊗ w2 [out/a, in/c, kh, kw]; w2 in two where the rank makes that smaller, as LyCORIS decides it."""
    out, inner, *kernel = shape
    a, c = (largest_divisor(side, min(factor or side, math.isqrt(side))) for side in (out, inner))
    b, d = out // a, inner // c
    if rank >= max(b, d) / 2:
        return {"lokr_w1": (a, c), "lokr_w2": (b, d, *kernel)}
    return {"lokr_w1": (a, c), "lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}


def _turning(size: int, module: ModuleInfo, settings: Settings) -> int:
    if size > 1:
        return size
    raise TargetError(
        f"{module.name} has {module.shape[0]} outputs, which no block of 2 to {settings.block_size} divides; raise "
        "`block_size`, or exclude it."
    )


def _butterfly(module: ModuleInfo, settings: Settings) -> Shape:
    """[stages, blocks, b, b]: b even, and the blocks' number divisible by 2^(stages - 1)."""
    out, apart = module.shape[0], 2 ** (settings.stages - 1)
    for size in range(min(out, settings.block_size), 1, -1):
        if size % 2 == 0 and out % size == 0 and (out // size) % apart == 0:
            return (settings.stages, out // size, size, size)
    raise TargetError(
        f"{module.name} has {module.shape[0]} outputs, of which no even blocks of at most {settings.block_size} make "
        f"{settings.stages} butterfly stages; lower `stages`, or exclude it."
    )


def _own(module: ModuleInfo, only: str) -> dict[str, Shape]:
    shape = tuple(module.shape)
    norm = len(shape) == 1
    found: dict[str, Shape] = {}
    if only != "bias":
        found["w_norm" if norm else "diff"] = shape
    if only != "weight" and has_bias(module):
        found["b_norm" if norm and found else "diff_b"] = (shape[0],)
    return found
