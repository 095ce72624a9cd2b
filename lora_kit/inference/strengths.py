"""Adapters at a strength for as long as pictures are drawn: folded into the weights where that is exact, else live.

A live LoRA costs two more products in every adapted layer and step. W + s · ΔW in the weight's own place makes each
step as cheap as the base's, for one pass over the weights a strength; the originals are kept and put back bit for bit.
Where the weights are fp32 that rounds no more than the live layers do. In 16 bits a small ΔW would be rounded away, so
there the adapters stay live.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from lora_kit.adapters import fuse, unfuse
from lora_kit.adapters.layers import live_layers
from lora_kit.adapters.record import adapter_names
from lora_kit.inference.batching import SHARE_OF_FREE, memory_at_hand
from lora_kit.inference.prepare import Prepared, scale_adapters
from lora_kit.models import ModelBundle


@contextmanager
def at_strengths(prepared: Prepared, scales: Sequence[float]) -> Generator[None]:
    """Each adapter at its strength inside, in the order of the files; afterwards live at these strengths, the base's
    weights bit for bit as they were."""
    scale_adapters(prepared, scales)
    if not folds(prepared.bundle):
        yield
        return
    try:
        fuse(prepared.bundle)
        yield
    finally:
        unfuse(prepared.bundle)


def folds(bundle: ModelBundle) -> bool:
    """Whether live adapters can go into the weights without being rounded more than live: all of those are fp32 (or
    fp64), and half of the memory at hand holds their originals (on the CPU, wherever the network is)."""
    weights = [cast(Tensor, layer.base.weight) for layer in live_layers(bundle.components).values()]
    if not weights or not adapter_names(bundle.components):
        return False
    if any(weight.dtype not in (torch.float32, torch.float64) for weight in weights):
        return False
    free = memory_at_hand(torch.device("cpu"))
    return free is None or sum(weight.numel() * weight.element_size() for weight in weights) <= free * SHARE_OF_FREE


def text_depends_on_strength(prepared: Prepared) -> bool:
    """Whether an adapter changes the text encoder, so that captions are encoded anew at each strength."""
    bundle = prepared.bundle
    return bundle.has_text and bool(live_layers({"text_encoder": bundle.text_encoder}))
