"""A file's tensors against a model: every disagreement is found and told at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters.formats.layout import Layout, RawUpdate
from lora_kit.adapters.state import LoraUpdate
from lora_kit.errors import AdapterFileError, did_you_mean
from lora_kit.targeting.plan import ModuleInfo

SHOWN = 40


class Split(NamedTuple):
    """A file's tensors by module, and the keys that are no part of an update."""

    updates: dict[str, RawUpdate]
    unknown: tuple[str, ...]


def split(layout: Layout, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Split:
    """Group the tensors by the module spelling of the file."""
    updates: dict[str, RawUpdate] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        parsed = layout.parse(key)
        if parsed is None or (parsed.part == "alpha" and tensor.numel() != 1):
            unknown.append(key)
            continue
        value = float(tensor) if parsed.part == "alpha" else tensor
        updates[parsed.module] = updates.get(parsed.module, RawUpdate())._replace(**{parsed.part: value})
    for module, alpha in layout.alphas(updates, metadata).items():
        if updates[module].alpha is None:
            updates[module] = updates[module]._replace(alpha=alpha)
    return Split(updates, tuple(unknown))


def fit(path: Path, layout: Layout, parts: Split, modules: Mapping[str, ModuleInfo]) -> dict[str, LoraUpdate]:
    """The updates under the model's dotted names, fp32, in the model's order and shapes.

    Raises one AdapterFileError that lists every unknown key, missing half, wrong shape and non-finite value.
    """
    problems = [f"{key}: unknown key" for key in parts.unknown]
    spellings = layout.spellings(modules)
    found: dict[str, LoraUpdate] = {}
    for spelling, raw in sorted(parts.updates.items()):
        name = spellings.get(spelling)
        if name is None:
            problems.append(f"{spelling}: no such module in the model.{did_you_mean(spelling, spellings)}")
            continue
        result = _update(raw, modules[name])
        if isinstance(result, str):
            problems.append(f"{spelling}: {result}")
        elif name in found:
            problems.append(f"{spelling}: {name} is in the file twice, under two spellings")
        else:
            found[name] = result
    if problems:
        raise AdapterFileError(_message(path, problems))
    return {name: found[name] for name in modules if name in found}


def _message(path: Path, problems: list[str]) -> str:
    lines = [f"{path} does not fit the model ({len(problems)} problems); nothing was loaded:"]
    lines += [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  … and {len(problems) - SHOWN} more")
    return "\n".join(lines)


def _update(raw: RawUpdate, module: ModuleInfo) -> LoraUpdate | str:
    """The update in the module's shapes, or what is wrong with it."""
    if raw.down is None or raw.up is None:
        halves = [part for part in ("down", "up") if getattr(raw, part) is None]
        return f"the {' and '.join(halves)} half is missing"
    rank = raw.down.shape[0] if raw.down.ndim else 0
    out, inner = module.shape[0], module.shape[1:]
    kernel = (1, 1) if module.kind == "conv" else ()
    down = _shaped(raw.down, (rank, *inner))
    up = _shaped(raw.up, (out, rank, *kernel))
    if rank == 0 or down is None or up is None:
        return (
            f"down {list(raw.down.shape)} and up {list(raw.up.shape)} do not fit the module's weight "
            f"{list(module.shape)}; allowed: [r, {', '.join(map(str, inner))}] and [{out}, r{', 1, 1' * bool(kernel)}]"
        )
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        return "holds NaN or infinite values"
    alpha = float(rank) if raw.alpha is None else raw.alpha
    if not math.isfinite(alpha):
        return f"alpha is {alpha}"
    return LoraUpdate(down, up, alpha)


def _shaped(factor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The factor as fp32 in `shape`, or None. [a, b] and [a, b, 1, 1] are one matrix: files have both."""
    if _matrix(tuple(factor.shape)) != _matrix(shape):
        return None
    # A copy: the file's own tensor is mapped from disk.
    return factor.reshape(shape).to(torch.float32, copy=True).contiguous()


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape
