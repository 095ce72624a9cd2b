"""What an adapter's updates look like: norms and spectra from the factors, without ever making a low-rank ΔW."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from lora_kit.adapters.formats.layout import RawUpdate
from lora_kit.adapters.updates import Update, build_update
from lora_kit.algebra.lowrank import effective_rank, rank_keeping, singular_values
from lora_kit.algebra.lowrank_dense import thin_svd
from lora_kit.algebra.lowrank_updates import Weights, bias_of, changes_weight, delta_of, factors_of, method_name
from lora_kit.errors import AdapterFileError

NEEDS_DENSE = "no low-rank form: needs a dense look (--dense)"
NEEDS_BASE = "ΔW depends on the base's weight: needs --dense and --base"

_BLOCK = re.compile(
    r"(?P<unet>unet)[._](?:(?P<way>down|up)_blocks[._](?P<level>\d+)|(?P<mid>mid_block))"
    r"|(?:text_encoder|lora_te)[._](?:(?:text_model[._])?encoder|model)[._]layers[._](?P<layer>\d+)"
)


class UpdateSpectrum(NamedTuple):
    """One module's update at strength 1. What was not looked at is None."""

    module: str
    """The dotted name if the base is known, else the file's spelling."""
    method: str
    rank: int | None
    alpha: float | None
    dtype: str
    shapes: dict[str, tuple[int, ...]]
    """Neutral part name → shape."""
    norm: float | None
    """‖ΔW‖ = √Σ ΔW² (Frobenius); of an update that changes the bias alone, that of Δbias."""
    singular_values: tuple[float, ...]
    """All of them, largest first; of a norm layer's or bias's vector none."""
    effective_rank: float | None
    """exp of the entropy of σ / Σ σ (Roy & Vetterli 2007)."""
    rank_95: int | None
    """The least rank that holds 95 % of the energy Σ σ²."""
    rank_99: int | None
    note: str | None

    @property
    def parameters(self) -> int:
        """Numbers in the file, alpha not counted."""
        return sum(math.prod(shape) for shape in self.shapes.values())


class BlockNorm(NamedTuple):
    """How much of the adapter is in one block."""

    block: str
    modules: int
    norm: float
    """√Σ ‖ΔW‖² over its modules."""
    share: float
    """Of the whole adapter's energy Σ ‖ΔW‖²."""


def spectrum(module: str, update: Update, dense: bool = False, weights: Weights | None = None) -> UpdateSpectrum:
    """Norm and singular values of ΔW.

    From the r × r core where the update has an exact low-rank form; else, if `dense`, from ΔW itself (with the
    base's weight where it depends on that). DoRA's are those of W' − W, so they too need a dense look.
    """
    note = _note(update, dense, weights)
    values = None if note else _values(module, update, weights)
    vector = values is not None and len(values) == 1 and _is_vector(update)
    return UpdateSpectrum(
        module,
        method_name(update),
        update.rank,
        getattr(update, "alpha", None),
        str(update.dtype).removeprefix("torch."),
        {name: tuple(part.shape) for name, part in update.parts().items()},
        None if values is None else float(values.norm()),
        () if values is None or vector else tuple(values.tolist()),
        None if values is None or vector else effective_rank(values),
        None if values is None or vector else rank_keeping(values, 0.95),
        None if values is None or vector else rank_keeping(values, 0.99),
        note,
    )


def _note(update: Update, dense: bool, weights: Weights | None) -> str | None:
    """Why there are no figures, or None if there are."""
    if update.needs_weight:
        return None if dense and weights is not None else NEEDS_BASE
    if dense or _is_vector(update) or factors_of(update) is not None:
        return None
    return NEEDS_DENSE


def _values(module: str, update: Update, weights: Weights | None) -> Tensor:
    bias = bias_of(update)
    if bias is not None and not changes_weight(update):
        return bias.norm()[None]
    factors = None if update.needs_weight else factors_of(update)
    if factors is not None:
        return singular_values(factors)
    delta = delta_of(module, update, weights)
    return thin_svd(delta.flatten(1)).values if delta.ndim > 1 else delta.norm()[None]


def _is_vector(update: Update) -> bool:
    """A norm layer's update: its parts are vectors."""
    return all(part.ndim < 2 for part in update.parts().values())


def built_updates(updates: Mapping[str, RawUpdate]) -> dict[str, Update]:
    """A file's updates in their own shapes, by the file's spelling, sorted.

    Raises AdapterFileError listing every module whose parts do not make an update.
    """
    found: dict[str, Update] = {}
    problems: list[str] = []
    for module in sorted(updates):
        try:
            found[module] = build_update(updates[module].parts, updates[module].alpha, None)
        except AdapterFileError as error:
            problems.append(f"{module}: {error}")
    if problems:
        raise AdapterFileError("\n  ".join([f"{len(problems)} updates are damaged:", *problems[:40]]))
    return found


def block_of(module: str) -> str:
    """`unet.down_blocks.0.…` or `lora_unet_down_blocks_0_…` → `unet down 0`; else the component alone."""
    found = _BLOCK.search(module)
    if found is None:
        return "text encoder" if module.startswith(("lora_te", "text_encoder")) else "unet"
    if found["layer"]:
        return f"text encoder {found['layer']}"
    return "unet mid" if found["mid"] else f"unet {found['way']} {found['level']}"


def block_norms(spectra: Mapping[str, UpdateSpectrum] | list[UpdateSpectrum]) -> list[BlockNorm]:
    """Blocks in the order the network runs them, text encoder first. Modules without a norm are left out."""
    rows = spectra if isinstance(spectra, list) else list(spectra.values())
    norms: dict[str, list[float]] = {}
    for one in rows:
        if one.norm is not None:
            norms.setdefault(block_of(one.module), []).append(one.norm)
    total = math.fsum(norm**2 for found in norms.values() for norm in found)
    return [
        BlockNorm(block, len(found), math.hypot(*found), math.fsum(n**2 for n in found) / total if total else 0.0)
        for block, found in sorted(norms.items(), key=lambda pair: _order(pair[0]))
    ]


def _order(block: str) -> tuple[int, int]:
    kinds = ("text encoder", "unet down", "unet mid", "unet up", "unet")
    kind, _, number = block.rpartition(" ") if block[-1].isdigit() else (block, "", "-1")
    return kinds.index(kind), int(number)
