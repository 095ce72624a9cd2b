"""Everything that can be told about an adapter file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from lora_kit.adapters.formats.family import family_of
from lora_kit.adapters.io import read_raw
from lora_kit.algebra.lowrank_files import fitting_base
from lora_kit.algebra.lowrank_updates import Weights
from lora_kit.algebra.spectrum import BlockNorm, UpdateSpectrum, block_norms, built_updates, spectrum
from lora_kit.errors import AdapterFileError


class Inspection(NamedTuple):
    """What an adapter file holds."""

    path: Path
    layout: str
    family: str | None
    """What the header says of the base."""
    fits: str | None
    """The first known base (or the one that was named) whose names and shapes the file fits."""
    misfit: str
    """Why it fits none."""
    spectra: tuple[UpdateSpectrum, ...]
    """In the base's order if one fits, else by the file's spelling."""
    blocks: tuple[BlockNorm, ...]
    embeddings: dict[str, tuple[int, ...]]
    """Learned token → shape."""
    unknown: tuple[str, ...]
    """Keys that are no part of an update."""
    metadata: dict[str, str]

    @property
    def norm(self) -> float:
        """√Σ ‖ΔW‖² over all modules that were looked at."""
        return math.hypot(*(one.norm for one in self.spectra if one.norm is not None))


def inspect_file(
    path: Path, base: str | None = None, dense: bool = False, weights: Weights | None = None
) -> Inspection:
    """Look at a file, whether or not a known base fits it.

    dense: also look at methods without factors, through ΔW itself; `weights` are the base's, for those that need it.
    Raises AdapterFileError for a file that is damaged, of an unknown layout, or holds updates that make no sense.
    """
    raw = read_raw(path)
    fits, misfit = None, ""
    try:
        fits, state = fitting_base(path, raw, base)
        updates = state.updates
    except AdapterFileError as error:
        updates, misfit = built_updates(raw.parts.updates), str(error)
    spectra = [spectrum(name, update, dense, weights) for name, update in updates.items()]
    return Inspection(
        path,
        raw.layout.name,
        family_of(raw.metadata),
        fits,
        misfit,
        tuple(spectra),
        tuple(block_norms(spectra)),
        {token: tuple(tensor.shape) for token, tensor in raw.embeddings.items()},
        raw.parts.unknown,
        raw.metadata,
    )
