"""Validation pictures: the prompts at each validation, and the sheets at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_kit.adapters import set_scale
from lora_kit.files import write_atomically
from lora_kit.inference import SamplingSettings, compose_grid, draw
from lora_kit.training.build import set_training
from lora_kit.training.folder import RunFolder
from lora_kit.training.metrics import Metrics
from lora_kit.training.objects import ADAPTER, Run
from lora_kit.training.prepared import visiting
from lora_kit.training.validation.batches import validation_settings

MOST_COLUMNS = 12
"""Steps on one sheet; of more, the first, the last and others evenly between."""
_ABOUT = "lora_kit.drawn"
Drawn = Mapping[float, Sequence[Image.Image]]
"""By strength, one picture a prompt."""


def draw_step(run: Run, folder: RunFolder, metrics: Metrics, step: int) -> None:
    """samples/step-….png, each prompt at strength 1; and what the sheets at the end need of this step."""
    section = run.recipe.validation
    strengths = [strength for strength in strengths_of(run) if strength not in (0.0, 1.0)] if section.step_grid else []
    drawn = {strength: draw_at(run, section.prompts, strength) for strength in (1.0, *strengths)}
    sheet = _sheet(run, {1.0: drawn[1.0]})
    save_picture(sheet, folder.samples / f"step-{step:06d}.png")
    metrics.picture("samples", sheet, step)
    if section.step_grid:
        _save_tiles(_tiles(folder, step), section.prompts, drawn)


def draw_final(run: Run, folder: RunFolder, metrics: Metrics, steps: Sequence[int]) -> None:
    """samples/final_grid.png, and with `step_grid` a sheet for each prompt, samples/steps-….png.

    steps: those at which the run was validated; a step whose pictures are not there, or were drawn for other prompts or
    strengths, has no column.
    """
    section = run.recipe.validation
    drawn = {strength: draw_at(run, section.prompts, strength) for strength in strengths_of(run)}
    sheet = _sheet(run, drawn)
    save_picture(sheet, folder.samples / "final_grid.png")
    metrics.picture("final_grid", sheet, steps[-1])
    if not section.step_grid:
        return
    tiles = {step: _read_tiles(_tiles(folder, step), section.prompts, drawn) for step in spread(steps)}
    columns = {step: found for step, found in tiles.items() if found is not None}
    if len(columns) < len(tiles):
        gone = ", ".join(str(step) for step in tiles if step not in columns)
        metrics.say(f"samples/steps-….png: no pictures of these prompts and strengths at step {gone}; left out.")
    for index, prompt in enumerate(section.prompts if columns else ()):
        rows = [[column[strength][index] for column in columns.values()] for strength in drawn]
        labels = [f"{prompt}\n{name}" for name in _labels(run, list(drawn))]
        sheet = compose_grid(rows, labels, [f"step {step}" for step in columns])
        save_picture(sheet, folder.samples / f"steps-{index:02d}.png")
        metrics.picture(f"steps-{index:02d}", sheet, steps[-1])


def draw_at(run: Run, prompts: Sequence[str], strength: float) -> list[Image.Image]:
    """The prompts at one strength, each with the section's seed, on the run's own schedule and prediction type."""
    seed = run.recipe.validation.seed
    with at_strength(run, strength), visiting(run.bundle):
        return draw(run.bundle, prompts, [seed] * len(prompts), settings=settings_of(run))


def settings_of(run: Run, steps: int | None = None, size: tuple[int, int] | None = None) -> SamplingSettings:
    """`validation_settings` of the run; steps: others than the section's."""
    settings = validation_settings(run.recipe, run.bundle, size)
    return settings if steps is None else replace(settings, steps=steps)


@contextmanager
def at_strength(run: Run, strength: float) -> Generator[None]:
    """The adapter at this strength, and evaluation mode, while inside."""
    if run.has_adapter:
        set_scale(run.bundle.components, {ADAPTER: strength})
    set_training(run.bundle, False)
    try:
        yield
    finally:
        set_training(run.bundle, True)
        if run.has_adapter:
            set_scale(run.bundle.components, {ADAPTER: 1.0})


def save_picture(picture: Image.Image, path: Path, about: PngInfo | None = None) -> None:
    """A PNG, whole or not there."""
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=about))


def spread(steps: Sequence[int]) -> list[int]:
    """At most MOST_COLUMNS of the steps, the first and the last among them."""
    if len(steps) <= MOST_COLUMNS:
        return list(steps)
    last = len(steps) - 1
    return [steps[round(place * last / (MOST_COLUMNS - 1))] for place in range(MOST_COLUMNS)]


def strengths_of(run: Run) -> list[float]:
    """One where there is no adapter: a full fine-tune's weights are the network's own, learned tokens have none."""
    return list(dict.fromkeys(run.recipe.validation.strengths)) if run.has_adapter else [1.0]


def _labels(run: Run, strengths: Sequence[float]) -> list[str]:
    return [f"strength {strength:g}" for strength in strengths] if run.has_adapter else ["trained weights"]


def _sheet(run: Run, drawn: Drawn) -> Image.Image:
    rows = [list(row) for row in zip(*drawn.values(), strict=True)]
    return compose_grid(rows, run.recipe.validation.prompts, _labels(run, list(drawn)))


def _tiles(folder: RunFolder, step: int) -> Path:
    return folder.samples / "tiles" / f"step-{step:06d}.png"


def _save_tiles(path: Path, prompts: Sequence[str], drawn: Drawn) -> None:
    """All pictures of a step as they are, a row for each strength: lossless, and no weights need be kept."""
    rows = list(drawn.values())
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(prompts), height * len(rows)))
    for down, row in enumerate(rows):
        for across, picture in enumerate(row):
            sheet.paste(picture, (across * width, down * height))
    about = PngInfo()
    about.add_text(_ABOUT, json.dumps({"prompts": list(prompts), "strengths": list(drawn)}))
    save_picture(sheet, path, about)


def _read_tiles(path: Path, prompts: Sequence[str], drawn: Drawn) -> Drawn | None:
    """The pictures of a step at each of `drawn`'s strengths; at strength 0 those of `drawn`, as the base's stay."""
    if not path.is_file():
        return None
    size = next(iter(drawn.values()))[0].size
    with Image.open(path) as sheet:
        about = json.loads(sheet.info.get(_ABOUT, "{}"))
        held: list[float] = about.get("strengths", [])
        missing = [strength for strength in drawn if strength != 0 and strength not in held]
        if missing or about.get("prompts") != list(prompts) or sheet.width != size[0] * len(prompts):
            return None
        return {
            strength: drawn[0.0] if strength == 0 else _cut(sheet, held.index(strength), len(prompts), size)
            for strength in drawn
        }


def _cut(sheet: Image.Image, row: int, count: int, size: tuple[int, int]) -> list[Image.Image]:
    width, height = size
    return [
        sheet.crop((column * width, row * height, (column + 1) * width, (row + 1) * height)) for column in range(count)
    ]
