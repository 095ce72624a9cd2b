"""Pictures of scaled adapters: one by one, or as a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from lora_kit.inference.grids import compose_grid
from lora_kit.inference.prepare import Prepared, scale_adapters
from lora_kit.inference.sampling import SamplingSettings, draw
from lora_kit.inference.starts import Inputs
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
    scale_adapters(prepared, scales)
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    each = None if inputs is None else [one for one in inputs for _ in seeds]
    images = draw(
        prepared.bundle,
        [prompt for prompt, _ in jobs],
        [seed for _, seed in jobs],
        settings=settings,
        inputs=each,
        progress=progress,
    )
    return [Picture(image, prompt, seed) for image, (prompt, seed) in zip(images, jobs, strict=True)]


def grid(
    prepared: Prepared,
    prompts: Sequence[str],
    seeds: Sequence[int],
    strengths: Sequence[float],
    settings: SamplingSettings,
    progress: ProgressBar = no_progress,
    inputs: Inputs = None,
) -> Image.Image:
    """A labelled sheet: a row for each prompt and seed, a column for each strength (of all adapters alike). inputs: as
    in `generate`."""
    columns = [
        generate(prepared, prompts, seeds, [strength] * len(prepared.adapters), settings, progress, inputs)
        for strength in strengths
    ]
    rows = [[column[index].image for column in columns] for index in range(len(columns[0]))]
    labels = [f"{picture.prompt}\nseed {picture.seed}" if len(seeds) > 1 else picture.prompt for picture in columns[0]]
    return compose_grid(rows, labels, [f"strength {strength:g}" for strength in strengths])
