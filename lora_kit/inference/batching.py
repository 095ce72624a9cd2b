"""How many pictures are drawn at once, and which of them are the same."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kit.inference.settings import SamplingSettings
from lora_kit.inference.starts import Inputs
from lora_kit.models import ModelBundle
from lora_kit.models.first_stage import vae_factor

# Pixels of one batch: four pictures of 512 × 512, which with guidance run as eight. More gains next to nothing.
BATCH_PIXELS = 4 * 512 * 512
LARGEST_BATCH = 64
SHARE_OF_FREE = 0.5
"""Of the memory at hand that a batch may take: the VAE, and other programs, want some too."""
_MEMINFO = Path("/proc/meminfo")


class Job(NamedTuple):
    """One picture to be drawn."""

    prompt: str
    seed: int
    place: int
    """Of the first request for it; its input picture is found there."""


class Jobs(NamedTuple):
    """What is really drawn of what was asked for."""

    distinct: list[Job]
    """Pictures with the same seed stand side by side: they begin at the same noise."""
    of_request: list[int]
    """For each request, its picture's place in `distinct`."""


def distinct_jobs(prompts: Sequence[str], seeds: Sequence[int], inputs: Inputs) -> Jobs:
    """Each combination of prompt, seed and input once."""
    keys = [
        (prompt, seed, start_key(inputs, place))
        for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    order = sorted(dict.fromkeys(keys), key=lambda key: key[1])
    places = {key: place for place, key in enumerate(order)}
    return Jobs([Job(key[0], key[1], first[key]) for key in order], [places[key] for key in keys])


def start_key(inputs: Inputs, place: int) -> Hashable:
    """Equal for requests with the same input picture, as far as that is known without comparing pixels."""
    return None if inputs is None else id(inputs[place])


def usual_batch_size(settings: SamplingSettings) -> int:
    """How many pictures of this size are drawn at once: `settings.batch_size`, or as many as BATCH_PIXELS allows. The
    same on every machine, as processes that draw with one sharded network need it."""
    if settings.batch_size is not None:
        return settings.batch_size
    return max(1, min(LARGEST_BATCH, BATCH_PIXELS // (settings.width * settings.height)))


def fitting_batch_size(bundle: ModelBundle, settings: SamplingSettings) -> int:
    """As `usual_batch_size`, and unless asked for no more than half of the memory at hand holds."""
    usual, free = usual_batch_size(settings), memory_at_hand(bundle.device)
    if settings.batch_size is not None or free is None:
        return usual
    return max(1, min(usual, int(free * SHARE_OF_FREE) // picture_bytes(bundle, settings)))


def picture_bytes(bundle: ModelBundle, settings: SamplingSettings) -> int:
    """About what one more picture in a batch takes: activations of the UNet, of two rows with guidance.

    ROW_WIDTHS tensors of the first block's width at the latents' size; measured, see there.
    """
    factor = vae_factor(bundle)
    config: Any = bundle.unet.config
    cells = (settings.width // factor) * (settings.height // factor)
    return (
        rows_of(bundle, settings)
        * ROW_WIDTHS
        * cells
        * int(config.block_out_channels[0])
        * bundle.unet.conv_in.weight.element_size()
    )


ROW_WIDTHS = 45
"""Peak of a forward without gradients, per row, in tensors [block_out_channels[0], h, w]: 43 to 44 with the tiny base
at 64 × 64 cells, fp32 (resident memory of 1, 4 and 8 rows)."""


def rows_of(bundle: ModelBundle, settings: SamplingSettings) -> int:
    """Rows of the network's batch that a picture is: two with guidance."""
    return 2 if settings.guidance > 1 and bundle.has_text else 1


def memory_at_hand(device: torch.device) -> int | None:
    """Bytes that can still be taken: free on the GPU (what torch holds and does not use counted in), or what Linux
    calls available; None where the system does not tell."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if not _MEMINFO.exists():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
