"""Whether a file's parts fit each other and a module, and their shapes there."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from lora_kit.adapters.updates.base import Parts, Shape
from lora_kit.errors import AdapterFileError


def check_names(names: Collection[str], needed: Collection[str], allowed: Collection[str], method: str) -> None:
    """Raise AdapterFileError unless `needed` ⊆ `names` ⊆ `allowed`."""
    missing, extra = sorted(set(needed) - set(names)), sorted(set(names) - set(allowed))
    problems: list[str] = []
    if missing:
        problems.append(f"the {' and '.join(missing)} {'half is' if len(missing) == 1 else 'halves are'} missing")
    if extra:
        verb = "is no part" if len(extra) == 1 else "are no parts"
        problems.append(f"{' and '.join(extra)} {verb} of a {method} update")
    if problems:
        raise AdapterFileError("; ".join(problems))


def check_matrices(parts: Parts, names: Collection[str]) -> None:
    """Raise AdapterFileError for each of `names` that has fewer than two dimensions or none of its size."""
    bad = [name for name in names if name in parts and (parts[name].ndim < 2 or 0 in parts[name].shape)]
    if bad:
        shapes = ", ".join(f"{name} {list(parts[name].shape)}" for name in bad)
        raise AdapterFileError(f"{shapes}: not a matrix or a convolution's kernel, or of rank 0")


def check_dimensions(parts: Parts, shape: Shape) -> None:
    """Raise AdapterFileError if the module has no matrix for weight: a norm takes only `w_norm` or `diff`."""
    if len(shape) < 2:
        raise AdapterFileError(f"{_listed(_shapes(parts))} cannot change the module's weight {list(shape)}: a norm's")


def fitted(parts: Parts, wanted: Mapping[str, Shape], shape: Shape | None) -> dict[str, Tensor]:
    """The parts named in `wanted`, each in its wanted shape.

    [a, b] and [a, b, 1, 1] are one matrix: files have both. Raises AdapterFileError with all shapes, got and allowed.
    """
    found = {name: reshaped(parts[name], into) for name, into in wanted.items() if name in parts}
    whole = {name: part for name, part in found.items() if part is not None}
    if len(whole) < len(found):
        target = "each other" if shape is None else f"the module's weight {list(shape)}"
        allowed = {name: list(wanted[name]) for name in found}
        raise AdapterFileError(f"{_listed(_shapes(parts, found))} do not fit {target}; allowed: {_listed(allowed)}")
    return whole


def reshaped(part: Tensor, shape: Shape) -> Tensor | None:
    """The part in `shape`, or None if it is another matrix."""
    return part.reshape(shape) if _matrix(tuple(part.shape)) == _matrix(shape) else None


def flat_kernel(parts: Parts, name: str, inner: Shape) -> dict[str, Tensor]:
    """`parts`, with `name` as [r, d·kh·kw] where it is [r, d, kh, kw] for a kernel `inner` = (d, kh, kw)."""
    part = parts[name]
    same = part.ndim == len(inner) + 1 and tuple(part.shape[1:]) == inner
    return {**parts, name: part.flatten(1)} if same else dict(parts)


def _matrix(shape: Shape) -> Shape:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _shapes(parts: Parts, names: Collection[str] | None = None) -> dict[str, list[int]]:
    return {name: list(parts[name].shape) for name in (parts if names is None else names)}


def _listed(shapes: Mapping[str, list[int]]) -> str:
    texts = [f"{name} {shape}" for name, shape in shapes.items()]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
