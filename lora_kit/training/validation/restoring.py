"""How well a base that restores pictures (super-resolution) gives the held-out ones back, and the sheets that show it.

Their low-resolution pictures are fixed: those that the held-out loss is measured with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import send_to_device
from PIL import Image

from lora_kit.data import Batch, collate
from lora_kit.inference import PictureInputs, compose_grid, draw
from lora_kit.models.family.picture_inputs import as_image
from lora_kit.training.folder import RunFolder
from lora_kit.training.metrics import Metrics
from lora_kit.training.objective import beside_latents
from lora_kit.training.objects import Run
from lora_kit.training.prepared import visiting
from lora_kit.training.validation.drawing import at_strength, save_picture, settings_of
from lora_kit.training.validation.likeness import psnr, ssim


class Pair(NamedTuple):
    """A held-out picture and what the network is given of it."""

    name: str
    original: Image.Image
    """At the size that training sees it at."""
    given: Image.Image
    """Low resolution."""


class Likeness(NamedTuple):
    """Means over pictures."""

    psnr: float
    """dB, over RGB."""
    ssim: float

    def named(self, of: str = "") -> dict[str, float]:
        """As figures: `psnr_bicubic`, …"""
        tail = f"_{of}" if of else ""
        return {f"psnr{tail}": round(self.psnr, 4), f"ssim{tail}": round(self.ssim, 6)}


def restores(run: Run) -> bool:
    """Whether there are pictures to give back."""
    return run.bundle.family.restores and run.held_out is not None and run.recipe.validation.restored > 0


def restoring_figures(run: Run, folder: RunFolder, metrics: Metrics, step: int) -> dict[str, float]:
    """Draw the held-out pairs at strength 1 into samples/step-….png; their PSNR and SSIM, and those of bicubic
    enlarging."""
    pairs = held_out_pairs(run)
    drawn, plain = restored(run, pairs, 1.0), [enlarged(pair) for pair in pairs]
    sheet = _sheet(pairs, {"bicubic": plain, f"step {step}": drawn})
    save_picture(sheet, folder.samples / f"step-{step:06d}.png")
    metrics.picture("samples", sheet, step)
    return likeness(drawn, pairs).named() | likeness(plain, pairs).named("bicubic")


def final_restoring(run: Run, folder: RunFolder, metrics: Metrics, step: int) -> dict[str, Any]:
    """Draw the held-out pairs at strength 0 and 1 into samples/restored.png; the figures of both and of bicubic
    enlarging. A full fine-tune has one strength: its weights are the network's own."""
    pairs = held_out_pairs(run)
    plain = [enlarged(pair) for pair in pairs]
    columns, figures = {"bicubic": plain}, dict[str, Any](restored_pictures=len(pairs))
    figures |= likeness(plain, pairs).named("bicubic")
    for strength in [1.0] if run.is_full else [0.0, 1.0]:
        drawn = restored(run, pairs, strength)
        columns["trained weights" if run.is_full else f"strength {strength:g}"] = drawn
        figures |= likeness(drawn, pairs).named(f"at_{strength:g}")
    sheet = _sheet(pairs, columns)
    save_picture(sheet, folder.samples / "restored.png")
    metrics.picture("restored", sheet, step)
    return figures


@torch.no_grad()
def held_out_pairs(run: Run) -> list[Pair]:
    """The first `validation.restored` held-out pictures, each degraded by fixed draws of its own."""
    measured = run.held_out
    assert measured is not None
    pairs: list[Pair] = []
    for place, record in enumerate(measured.records[: run.recipe.validation.restored]):
        sample = measured.pictures.plain(record)
        batch = cast(Batch, send_to_device(collate([sample]), run.bundle.device))
        given = beside_latents(run.bundle, batch, [(measured.seed, measured.use, place)])
        assert given is not None and sample.pixels is not None
        pairs.append(Pair(sample.id, as_image(sample.pixels), as_image(given[0])))
    return pairs


def restored(run: Run, pairs: Sequence[Pair], strength: float) -> list[Image.Image]:
    """What the network makes of the pairs' low-resolution pictures, in their order, with the section's seed."""
    seed, by_size = run.recipe.validation.seed, dict[tuple[int, int], list[int]]()
    for index, pair in enumerate(pairs):
        by_size.setdefault(pair.original.size, []).append(index)
    found: dict[int, Image.Image] = {}
    with at_strength(run, strength), visiting(run.bundle):
        for size, indices in by_size.items():
            inputs = [PictureInputs(pairs[index].given) for index in indices]
            count = len(inputs)
            drawn = draw(run.bundle, [""] * count, [seed] * count, settings=settings_of(run, size=size), inputs=inputs)
            found |= zip(indices, drawn, strict=True)
    return [found[index] for index in range(len(pairs))]


def enlarged(pair: Pair) -> Image.Image:
    """The low-resolution picture at the original's size, by bicubic interpolation."""
    return pair.given.resize(pair.original.size, Image.Resampling.BICUBIC)


def likeness(pictures: Sequence[Image.Image], pairs: Sequence[Pair]) -> Likeness:
    """To the originals."""
    both = list(zip(pictures, pairs, strict=True))
    return Likeness(
        sum(psnr(picture, pair.original) for picture, pair in both) / len(both),
        sum(ssim(picture, pair.original) for picture, pair in both) / len(both),
    )


def restoring_lines(figures: dict[str, Any]) -> list[str]:
    """The final figures for a reader."""
    if "psnr_bicubic" not in figures or "restored_pictures" not in figures:
        return []
    told = [
        f"{name} {figures[f'psnr_{key}']:.2f} dB / {figures[f'ssim_{key}']:.4f}"
        for name, key in (("strength 1", "at_1"), ("strength 0", "at_0"), ("bicubic", "bicubic"))
        if f"psnr_{key}" in figures
    ]
    return [f"PSNR / SSIM of {figures['restored_pictures']} held-out pictures: {', '.join(told)}"]


def _sheet(pairs: Sequence[Pair], columns: dict[str, list[Image.Image]]) -> Image.Image:
    """A row for each pair: low resolution (its pixels enlarged as they are), the columns, the original."""
    rows = [
        [pair.given.resize(pair.original.size, Image.Resampling.NEAREST), *drawn, pair.original]
        for pair, *drawn in zip(pairs, *columns.values(), strict=True)
    ]
    return compose_grid(rows, [pair.name for pair in pairs], ["low resolution", *columns, "original"])
