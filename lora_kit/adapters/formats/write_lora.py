"""What diffusers' and PEFT's layouts have in common: `lora_A`, `lora_B`, and a LoraConfig that tells alpha and rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_kit.adapters.formats.write_common import cast
from lora_kit.adapters.state import is_plain_lora
from lora_kit.adapters.updates import LoraUpdate, Update

MAGNITUDE = ".lora_magnitude_vector"


def unholdable(updates: Mapping[str, Update]) -> dict[str, str]:
    """Module → why PEFT's LoRA layers cannot hold its update; empty if they can hold all, bit for bit."""
    found = {name: reason for name, update in updates.items() if (reason := _reason(update)) is not None}
    plain = [name for name, update in updates.items() if name not in found and is_plain_lora(update)]
    if plain and len(plain) + len(found) < len(updates):
        # `use_dora` is one switch for a whole network: beside DoRA, plain LoRA would be normalised too.
        doras = [name for name in updates if name not in found and name not in plain]
        found |= dict.fromkeys(
            doras, "it is DoRA and others of the network are not, which PEFT's one switch cannot say"
        )
    return found


def lora_tensors(name: str, update: Update, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Suffix → tensor of one module in PEFT's spelling."""
    assert isinstance(update, LoraUpdate)
    found = {".lora_A.weight": cast(update.down, dtype, name), ".lora_B.weight": cast(update.up, dtype, name)}
    if update.magnitude is not None:
        out = update.up.shape[0]
        # PEFT's own shapes: [out] over a linear layer, [1, out, 1, 1] over a convolution.
        shape = (1, out, 1, 1) if update.up.ndim == 4 else (out,)
        found[MAGNITUDE] = cast(update.magnitude, dtype, name).reshape(shape)
    return found


def lora_config(updates: Mapping[str, Update]) -> dict[str, Any]:
    """PEFT's LoraConfig for one component's updates (names without the component), so that each has its own alpha.

    The commonest rank and alpha are the defaults; others are patterns. A name that ends another's gets PEFT's `^`.
    """
    ranks = {name: update.rank or 0 for name, update in updates.items()}
    alphas = {name: _number(update.alpha) for name, update in updates.items() if isinstance(update, LoraUpdate)}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_anchored(name, ranks): own for name, own in sorted(ranks.items()) if own != rank},
        "alpha_pattern": {_anchored(name, ranks): own for name, own in sorted(alphas.items()) if own != alpha},
        "target_modules": sorted(updates),
        "bias": "none",
        "lora_bias": False,
        "use_dora": any(isinstance(one, LoraUpdate) and one.magnitude is not None for one in updates.values()),
        "use_rslora": False,
    }


def _reason(update: Update) -> str | None:
    if not isinstance(update, LoraUpdate):
        return f"its method is {update.method}"
    if update.mid is not None:
        return "it is a Tucker convolution (lora_mid)"
    if update.bias is not None:
        return "it changes a bias too (diff_b)"
    if update.magnitude is not None and update.magnitude.shape[0] != update.up.shape[0]:
        return "its DoRA magnitudes are those of the inputs, PEFT's are those of the outputs"
    return None


def _commonest(values: Any) -> Any:
    """The most frequent; of several the smallest, so that equal content makes equal files."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() and abs(alpha) < 1 << 53 else alpha


def _anchored(name: str, names: Mapping[str, object]) -> str:
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name
