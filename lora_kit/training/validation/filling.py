"""Validation pictures of an inpainting run: held-out pictures with a part masked, and how it was filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from lora_kit.diffusion import generator_for
from lora_kit.inference import compose_grid, draw
from lora_kit.models.family.inpainting import FillsMasks
from lora_kit.models.family.picture_inputs import PictureInputs
from lora_kit.training.folder import RunFolder
from lora_kit.training.metrics import Metrics
from lora_kit.training.objects import Run
from lora_kit.training.prepared import visiting
from lora_kit.training.validation.drawing import at_strength, save_picture, settings_of, strengths_of

GREY = (128, 128, 128)


class Hole(NamedTuple):
    """A held-out picture, to be filled."""

    caption: str
    inputs: PictureInputs

    @property
    def seen(self) -> Image.Image:
        """The picture as the network is given it: grey where it is masked."""
        image, mask = self.inputs.image, self.inputs.mask
        return image if mask is None else Image.composite(Image.new("RGB", image.size, GREY), image, mask)


def draw_filled(run: Run, folder: RunFolder, metrics: Metrics, step: int, final: bool = False) -> None:
    """samples/filled-step-….png: the first held-out pictures (`inpainting.shown`), each with a mask that is the same at
    every validation, filled at strength 1; final: samples/filled_final.png, at every strength.

    Nothing is drawn for a base that is given no mask, nor without held-out pictures.
    """
    holes = _holes(run)
    if not holes:
        return
    strengths = strengths_of(run) if final else [1.0]
    columns = [[hole.inputs.image for hole in holes], [hole.seen for hole in holes]]
    columns += [_filled(run, holes, strength) for strength in strengths]
    names = ["held-out picture", "given", *(f"filled at {strength:g}" for strength in strengths)]
    rows = [list(row) for row in zip(*columns, strict=True)]
    sheet = compose_grid(rows, [hole.caption for hole in holes], names)
    name = "filled_final" if final else f"filled-step-{step:06d}"
    save_picture(sheet, folder.samples / f"{name}.png")
    metrics.picture("filled_final" if final else "filled", sheet, step)


def _holes(run: Run) -> list[Hole]:
    family, measured = run.bundle.family, run.held_out
    if not isinstance(family, FillsMasks) or measured is None:
        return []
    found: list[Hole] = []
    for record in measured.records[: family.section.shown]:
        sample = measured.pictures.plain(record)
        assert sample.pixels is not None, "the data set keeps pixels"
        inputs = family.part_of(sample.pixels, sample.hole, generator_for(measured.seed, "filled", record))
        found.append(Hole(sample.caption, inputs))
    return found


def _filled(run: Run, holes: Sequence[Hole], strength: float) -> list[Image.Image]:
    """One by one: they may differ in size."""
    bundle, section = run.bundle, run.recipe.validation
    drawn: list[Image.Image] = []
    with at_strength(run, strength), visiting(bundle):
        for hole in holes:
            width, height = hole.inputs.image.size
            settings = replace(settings_of(run), width=width, height=height)
            drawn += draw(bundle, [hole.caption], [section.seed], settings=settings, inputs=[hole.inputs])
    return drawn
