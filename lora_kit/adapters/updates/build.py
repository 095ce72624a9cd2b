"""Parts → the update they are."""

from __future__ import annotations

import math

import torch

from lora_kit.adapters.updates.base import Parts, Shape, Update
from lora_kit.adapters.updates.lora import LoraUpdate
from lora_kit.errors import AdapterFileError

METHODS: tuple[type[Update], ...] = (LoraUpdate,)


def build_update(parts: Parts, alpha: float | None, shape: Shape | None) -> Update:
    """The update that `parts` make for a module whose weight has `shape` (None: no module at hand).

    Raises AdapterFileError, without the module's name, if they are no update, do not fit, or are not finite.
    """
    update = LoraUpdate.from_parts(parts, alpha, shape)
    bad = [name for name, part in update.parts().items() if not bool(torch.isfinite(part).all())]
    if bad:
        raise AdapterFileError(f"holds NaN or infinite values (in {', '.join(bad)})")
    if alpha is not None and not math.isfinite(alpha):
        raise AdapterFileError(f"alpha is {alpha}")
    return update
