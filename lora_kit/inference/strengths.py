"""Adapters at a strength for as long as pictures are drawn: folded into the weights where that is exact, else live.

A live LoRA costs two more products in every adapted layer and step. W + s · ΔW in the weight's own place makes each
step as cheap as the base's, for one pass over the weights a strength; the originals are kept and put back bit for bit.
Where the weights are fp32 that rounds no more than the live layers do. In 16 bits a small ΔW would be rounded away, so
there the adapters stay live; as they do where there is too little to draw for the pass to pay, or too little memory.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from lora_kit.adapters import fuse, unfuse
from lora_kit.adapters.layers import live_layers
from lora_kit.adapters.record import is_fused
from lora_kit.inference.batching import SHARE_OF_FREE, memory_at_hand, rows_of
from lora_kit.inference.prepare import Prepared, scale_adapters
from lora_kit.inference.settings import SamplingSettings
from lora_kit.models import ModelBundle
from lora_kit.models.first_stage import vae_factor


@contextmanager
def at_strengths(
    prepared: Prepared, scales: Sequence[float], settings: SamplingSettings, count: int
) -> Generator[None]:
    """Each adapter at its strength inside, in the order of the files; afterwards live at these strengths, the base's
    weights bit for bit as they were. count: pictures to be drawn."""
    scale_adapters(prepared, scales)
    if not (folding_pays(prepared.bundle, settings, count) and can_fold(prepared.bundle)):
        yield
        return
    try:
        fuse(prepared.bundle)
        yield
    finally:
        if is_fused(prepared.bundle.components):  # not where `fuse` refused
            unfuse(prepared.bundle)


FOLDING_WORK = 192
"""Latent cells that go through the network before folding pays, for each channel of its first block.

Live layers cost in proportion to cells × rank × widths, folding to the weights, widths squared. Measured with rank 16
on every linear layer and convolution, fp32, one thread, eight rows at once: a live row of SD 1.5 at 256 px costs 0.16
CPU s more than a folded one, and folding and restoring 9 CPU s: 185 cells a channel. The tiny base: 0.005 against 0.08,
which is 85.
"""


def folding_pays(bundle: ModelBundle, settings: SamplingSettings, count: int) -> bool:
    """Whether `count` pictures are work enough to win back the pass over the weights."""
    config: Any = bundle.unet.config
    cells = settings.width * settings.height // vae_factor(bundle) ** 2
    rows = count * settings.steps * rows_of(bundle, settings)
    return rows * cells >= FOLDING_WORK * int(config.block_out_channels[0])


def can_fold(bundle: ModelBundle) -> bool:
    """Whether live adapters can go into the weights without being rounded more than live: all of those are fp32 (or
    fp64), and half of the memory at hand holds their originals (on the CPU, wherever the network is)."""
    weights = [cast(Tensor, layer.base.weight) for layer in live_layers(bundle.components).values()]
    if not weights or any(weight.dtype not in (torch.float32, torch.float64) for weight in weights):
        return False
    free = memory_at_hand(torch.device("cpu"))
    return free is None or sum(weight.numel() * weight.element_size() for weight in weights) <= free * SHARE_OF_FREE


def text_depends_on_strength(prepared: Prepared) -> bool:
    """Whether an adapter changes the text encoder, so that captions are encoded anew at each strength."""
    bundle = prepared.bundle
    return bundle.has_text and bool(live_layers({"text_encoder": bundle.text_encoder}))
