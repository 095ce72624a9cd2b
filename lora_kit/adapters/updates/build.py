"""Parts → the update they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_kit.adapters.updates.base import Parts, Shape, Update
from lora_kit.adapters.updates.full import FullUpdate, NormUpdate
from lora_kit.adapters.updates.glora import GloraUpdate
from lora_kit.adapters.updates.ia3 import Ia3Update
from lora_kit.adapters.updates.loha import LohaUpdate
from lora_kit.adapters.updates.lokr import LokrUpdate
from lora_kit.adapters.updates.lora import LoraUpdate
from lora_kit.adapters.updates.oft import BoftUpdate, OftUpdate
from lora_kit.errors import AdapterFileError

METHODS: tuple[type[Update], ...] = (
    LoraUpdate,
    LohaUpdate,
    LokrUpdate,
    FullUpdate,
    NormUpdate,
    OftUpdate,
    BoftUpdate,
    GloraUpdate,
    Ia3Update,
)
WHOLE_NUMBERS = {"on_input"}
"""Parts that need not be floating-point."""
_SHARED = {"magnitude", "diff_b"}
"""Parts that go with several methods."""


def build_update(parts: Parts, alpha: float | None, shape: Shape | None) -> Update:
    """The update that `parts` make for a module whose weight has `shape` (None: no module at hand).

    Raises AdapterFileError, without the module's name, if they are no update, do not fit, or are not finite numbers.
    """
    problems: list[str] = []
    whole = [name for name, part in parts.items() if not part.is_floating_point() and name not in WHOLE_NUMBERS]
    if whole:
        kinds = ", ".join(f"{name} is {str(parts[name].dtype).removeprefix('torch.')}" for name in whole)
        raise AdapterFileError(f"{kinds}; allowed: floating-point numbers")
    bad = [name for name, part in parts.items() if not _is_finite(part)]
    if bad:
        problems.append(f"holds NaN or infinite values (in {', '.join(bad)})")
    if alpha is not None and not math.isfinite(alpha):
        problems.append(f"alpha is {alpha}")
    try:
        update = _method(parts).from_parts(parts, alpha, shape)
    except AdapterFileError as error:
        raise AdapterFileError("; ".join([*problems, str(error)])) from error
    if problems:
        raise AdapterFileError("; ".join(problems))
    return update


def _is_finite(part: Tensor) -> bool:
    # Some one-byte floats have no isfinite of their own.
    return bool(torch.isfinite(part.float() if part.element_size() == 1 else part).all())


def _method(parts: Parts) -> type[Update]:
    """The one method that the parts are of. Raises AdapterFileError if there are several, or none."""
    own = {method: sorted((method.allowed - _SHARED) & parts.keys()) for method in METHODS}
    found = [method for method, names in own.items() if names]
    if "oft_blocks" in parts or "rescale" in parts:
        other = BoftUpdate if parts.get("oft_blocks", torch.empty(0)).ndim != 4 else OftUpdate
        found.remove(other)
    if len(found) > 1:
        listed = ", ".join(f"{method.method} ({' and '.join(own[method])})" for method in found)
        raise AdapterFileError(f"holds parts of several methods: {listed}")
    if found:
        return found[0]
    if "diff_b" in parts:
        return FullUpdate
    raise AdapterFileError(f"{' and '.join(sorted(parts)) or 'alpha alone'} is no update: all else is missing")
