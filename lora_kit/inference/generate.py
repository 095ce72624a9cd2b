"""Pictures of scaled adapters: one by one, or as a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image

from lora_kit.inference.batching import fitting_batch_size
from lora_kit.inference.captions import CaptionStates
from lora_kit.inference.grids import compose_grid
from lora_kit.inference.prepare import Prepared
from lora_kit.inference.sampling import draw
from lora_kit.inference.settings import SamplingSettings
from lora_kit.inference.starts import Inputs
from lora_kit.inference.strengths import at_strengths, text_depends_on_strength
from lora_kit.progress import ProgressBar, no_progress


class Picture(NamedTuple):
    """A drawn picture and what it was drawn from."""

    image: Image.Image
    prompt: str
    seed: int


def generate(
    prepared: Prepared,
    prompts: Sequence[str],
    seeds: Sequence[int],
    scales: Sequence[float],
    settings: SamplingSettings,
    progress: ProgressBar = no_progress,
    inputs: Inputs = None,
) -> list[Picture]:
    """Every prompt with every seed, adapters at `scales`: prompt after prompt.

    inputs: what each prompt is drawn from, as many as prompts; None: from noise alone. At scale 0 the picture is the
    base's bit for bit.
    """
    captions = CaptionStates(prepared.bundle, settings.long_prompts)
    return _column(prepared, prompts, seeds, settings, _Shared(scales, captions, progress, inputs))


def grid(
    prepared: Prepared,
    prompts: Sequence[str],
    seeds: Sequence[int],
    strengths: Sequence[float],
    settings: SamplingSettings,
    progress: ProgressBar = no_progress,
    inputs: Inputs = None,
) -> Image.Image:
    """A labelled sheet: a row for each prompt and seed, a column for each strength. Arguments as `generate_columns`."""
    drawn = generate_columns(prepared, prompts, seeds, strengths, settings, progress, inputs)
    pictures = drawn[strengths[0]]
    rows = [[drawn[strength][index].image for strength in strengths] for index in range(len(pictures))]
    labels = [f"{picture.prompt}\nseed {picture.seed}" if len(seeds) > 1 else picture.prompt for picture in pictures]
    return compose_grid(rows, labels, [f"strength {strength:g}" for strength in strengths])


def generate_columns(
    prepared: Prepared,
    prompts: Sequence[str],
    seeds: Sequence[int],
    strengths: Sequence[float],
    settings: SamplingSettings,
    progress: ProgressBar = no_progress,
    inputs: Inputs = None,
) -> dict[float, list[Picture]]:
    """Strength (of all adapters alike) → the pictures that `generate` draws there. inputs: as there.

    Captions are encoded once for all strengths where no adapter changes the text encoder, and a strength that is asked
    for twice is drawn once.
    """
    captions, drawn = CaptionStates(prepared.bundle, settings.long_prompts), dict[float, list[Picture]]()
    for strength in dict.fromkeys(strengths):
        if text_depends_on_strength(prepared):
            captions = CaptionStates(prepared.bundle, settings.long_prompts)
        shared = _Shared([strength] * len(prepared.adapters), captions, progress, inputs)
        drawn[strength] = _column(prepared, prompts, seeds, settings, shared)
    return drawn


class _Shared(NamedTuple):
    """What a column is drawn with besides prompts and seeds."""

    scales: Sequence[float]
    captions: CaptionStates
    progress: ProgressBar
    inputs: Inputs


def _column(
    prepared: Prepared, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings, shared: _Shared
) -> list[Picture]:
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    each = None if shared.inputs is None else [one for one in shared.inputs for _ in seeds]
    # Folding comes first: a weight that changes in inference mode has no version counter to tell of it.
    with at_strengths(prepared, shared.scales, settings, len(jobs)), torch.inference_mode():
        size = fitting_batch_size(prepared.bundle, settings)
        images = draw(
            prepared.bundle,
            [prompt for prompt, _ in jobs],
            [seed for _, seed in jobs],
            settings=replace(settings, batch_size=size),
            inputs=each,
            captions=shared.captions,
            progress=shared.progress,
        )
    return [Picture(image, prompt, seed) for image, (prompt, seed) in zip(images, jobs, strict=True)]
