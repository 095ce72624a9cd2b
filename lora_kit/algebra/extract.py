"""The difference of two bases as a low-rank adapter: tuned − base, module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters.updates import FullUpdate, LoraUpdate, NormUpdate, Update
from lora_kit.algebra.extract_source import Parameters, open_parameters
from lora_kit.algebra.lowrank import Budget
from lora_kit.algebra.lowrank_report import ModuleLoss
from lora_kit.algebra.lowrank_updates import factorised
from lora_kit.errors import ModelError, RecipeError
from lora_kit.progress import ProgressBar, no_progress

_EMBEDDINGS = (".token_embedding", ".position_embedding")
SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What to keep of the difference."""

    budget: Budget
    """Of each module."""
    norms: bool = False
    """Also differences of norm layers, as they are."""
    biases: bool = False
    """Also differences of linear and convolution biases, as they are."""
    dtype: torch.dtype | None = None
    """Of what is written. None: the tuned weights' own."""
    seed: int = 0
    """Of the randomised SVD's sketch."""


class Extracted(NamedTuple):
    """What was found."""

    updates: dict[str, Update]
    """Dotted module name → its update: LoRA with alpha = rank, `norm`, or `full` of a bias alone."""
    losses: tuple[ModuleLoss, ...]
    unchanged: int
    """Parameters that are equal in both, up to the cast to the narrower dtype."""
    left_out: tuple[str, ...]
    """Changed parameters that were not asked for, or that no adapter file can hold (embeddings)."""
    one_sided: tuple[str, ...]
    """Components that only one of the two holds: not compared."""
    family: str
    """`sd1` or `sd2`, by the shapes; empty for other sizes."""


def extract(base: Path, tuned: Path, options: ExtractOptions, progress: ProgressBar = no_progress) -> Extracted:
    """Factors of tuned − base for every linear and convolution that differs, UNet and text encoder.

    Both are read parameter by parameter from their mapped files, and each difference is taken and factorised in
    float64 by itself, so that memory holds a few tensors of the largest size. alpha = rank: what is written is
    up · down itself. Raises RecipeError where nothing differs, ModelError where the two are not of one architecture
    or a difference is not finite.
    """
    first, second = open_parameters(base), open_parameters(tuned)
    one_sided = _check(first, second)
    names = [name for name in first.shapes if name in second.shapes]
    shapes = {name.removesuffix(".weight"): first.shapes[name] for name in names if name.endswith(".weight")}
    work = _Work(options, shapes)
    for name in progress(names, "comparing", len(names)):
        work.add(name, first.read(name), second.read(name))
    found = work.result(one_sided, first.family)
    if not found.updates:
        raise RecipeError(f"{tuned} has nothing that an adapter could hold: {_nothing(found)}")
    return found


class _Work:
    """What has been gathered so far."""

    def __init__(self, options: ExtractOptions, weights: Mapping[str, tuple[int, ...]]) -> None:
        self.options, self.weights = options, weights
        self.updates: dict[str, Update] = {}
        self.vectors: dict[str, dict[str, Tensor]] = {}
        """Module → `weight` and `bias` of a norm, `bias` of any other."""
        self.losses: list[ModuleLoss] = []
        self.left_out: list[str] = []
        self.unchanged = 0

    def add(self, name: str, base: Tensor, tuned: Tensor) -> None:
        if _equal(base, tuned):
            self.unchanged += 1
            return
        kind = self._kind(name)
        if kind == "matrix":
            module = name.removesuffix(".weight")
            dtype = self.options.dtype or tuned.dtype
            delta = _difference(name, base, tuned)
            self.updates[module], loss = factorised(module, delta, self.options.budget, dtype, self.options.seed)
            self.losses.append(loss)
        elif (kind == "norm" and self.options.norms) or (kind == "bias" and self.options.biases):
            module, _, part = name.rpartition(".")
            delta = _difference(name, base, tuned).to(self.options.dtype or tuned.dtype)
            self.vectors.setdefault(module, {})[part] = delta
        else:
            self.left_out.append(name)

    def _kind(self, name: str) -> str:
        module, _, kind = name.rpartition(".")
        shape = self.weights.get(module, ())
        if module.endswith(_EMBEDDINGS) or kind not in ("weight", "bias"):
            return "other"
        if len(shape) == 1:
            return "norm"
        return "bias" if kind == "bias" else "matrix"

    def result(self, one_sided: tuple[str, ...], family: str) -> Extracted:
        for module, parts in self.vectors.items():
            self.updates[module] = _with_vectors(self.updates.get(module), parts, len(self.weights[module]) == 1)
        updates = {module: self.updates[module] for module in self.weights if module in self.updates}
        gathered = updates, tuple(self.losses), self.unchanged, tuple(self.left_out)
        return Extracted(*gathered, one_sided, family)


def _with_vectors(update: Update | None, parts: Mapping[str, Tensor], norm: bool) -> Update:
    """The update with differences of vectors: LyCORIS's `norm`, a LoRA's `diff_b`, or `full` with `diff_b` alone."""
    if norm:
        some = next(iter(parts.values()))
        return NormUpdate(parts.get("weight", torch.zeros_like(some)), parts.get("bias"))
    bias = parts["bias"]
    return replace(update, bias=bias) if isinstance(update, LoraUpdate) else FullUpdate(None, bias)


def _difference(name: str, base: Tensor, tuned: Tensor) -> Tensor:
    """tuned − base in float64: exact for halves and singles."""
    delta = tuned.double().sub_(base.reshape(tuned.shape))
    if not bool(torch.isfinite(delta).all()):
        raise ModelError(f"{name}: one of the two bases holds NaN or infinite values there")
    return delta


def _equal(base: Tensor, tuned: Tensor) -> bool:
    """Whether the two are one value, stored in one dtype or cast to the narrower."""
    base = base.reshape(tuned.shape)
    if torch.equal(base, tuned) if base.dtype == tuned.dtype else False:
        return True
    return base.dtype != tuned.dtype and (
        torch.equal(base.to(tuned.dtype), tuned) or torch.equal(base, tuned.to(base.dtype))
    )


def _check(base: Parameters, tuned: Parameters) -> tuple[str, ...]:
    """Components that only one side has. Raises ModelError where the shared ones differ in names or shapes."""
    sides = [{name.partition(".")[0] for name in one.shapes} for one in (base, tuned)]
    shared = sides[0] & sides[1]
    problems: list[str] = []
    for one, other in ((base, tuned), (tuned, base)):
        only = [name for name in one.shapes if name.partition(".")[0] in shared and name not in other.shapes]
        problems += [f"{name}: only {one.path} has it" for name in only]
    for name, shape in base.shapes.items():
        if name in tuned.shapes and _matrix(shape) != _matrix(tuned.shapes[name]):
            problems.append(f"{name}: {list(shape)} in {base.path}, {list(tuned.shapes[name])} in {tuned.path}")
    if problems or not shared:
        raise ModelError(_message(base, tuned, problems or ["they have no component in common"]))
    return tuple(sorted(sides[0] ^ sides[1]))


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _message(base: Parameters, tuned: Parameters, problems: Sequence[str]) -> str:
    more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    listed = "\n  ".join([*problems[:SHOWN], *more])
    return f"{base.path} and {tuned.path} are not of one architecture ({len(problems)} problems):\n  {listed}"


def _nothing(found: Extracted) -> str:
    if not found.left_out:
        return f"all its {found.unchanged} parameters equal the base's"
    return f"only {', '.join(found.left_out[:8])} changed ({len(found.left_out)} in all; see --norms and --biases)"
