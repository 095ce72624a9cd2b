"""The two sheets of docs/models/inpainting.md: drawing from a picture, and filling a masked part of one.

    python scripts/tiny_base/picture_inputs.py --pictures data/openmoji/color \
        --inpainting runs/tiny-inpainting/run/model_ema --fresh runs/tiny-inpainting/fresh --out docs/models

img2img.png: pictures drawn anew under another prompt, at rising strength, by the tiny base.

inpaint.png: pictures that inpainting.yaml held out, mirrored (the base knows them by their names, the other way round),
filled by the widened base before and after its training, and by the tiny base itself, which sees no mask. Also prints
how far all of them are from the true pictures, within the mask and around it: mean absolute difference of 8-bit values.
"""

from __future__ import annotations

import argparse
import json
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from lora_kit.data.pictures import square_picture
from lora_kit.inference import SamplingSettings, compose_grid, draw
from lora_kit.models import ModelBundle, load_bundle
from lora_kit.models.family.picture_inputs import PictureInputs
from lora_kit.progress import no_progress
from lora_kit.recipe import ModelSection, load_recipe
from lora_kit.training.caching import data_sets

RECIPE = Path(__file__).with_name("inpainting.yaml")
SIDE = 64
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
DRAWN_ANEW = (("red apple", "tomato"), ("tulip", "rose"), ("cat face", "dog face"))
"""Name of the picture, and the prompt it is drawn anew under."""
GREY = (128, 128, 128)
SHOWN = 6


def bundle_of(base: str) -> ModelBundle:
    return load_bundle(ModelSection(base=base))


def picture_of(folder: Path, name: str) -> Image.Image:
    lines = map(json.loads, (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    files = [line["file_name"] for line in lines if line["text"] == name]
    if not files:
        raise SystemExit(f"{folder} has no picture named {name!r}")
    with Image.open(folder / files[0]) as picture:
        return square_picture(picture.convert("RGB"), SIDE)


def errors(drawn: Image.Image, given: PictureInputs) -> tuple[float, float]:
    """Mean absolute difference of 8-bit values from the true picture: within the mask, and around it."""
    assert given.mask is not None
    difference = np.abs(np.asarray(drawn, dtype=np.float64) - np.asarray(given.image, dtype=np.float64))
    inside = np.asarray(given.mask) >= 128
    return float(difference[inside].mean()), float(difference[~inside].mean())


def masks() -> list[Image.Image]:
    """The upper half, the middle, and the right half."""
    found: list[Image.Image] = []
    for box in ((0, 0, 63, 31), (18, 18, 45, 45), (32, 0, 63, 63)):
        mask = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(mask).rectangle(box, fill=255)
        found.append(mask)
    return found


def settings(strength: float) -> SamplingSettings:
    return SamplingSettings(steps=40, guidance=3.0, width=SIDE, height=SIDE, strength=strength)


def drawn(bundle: ModelBundle, prompts: list[str], inputs: list[PictureInputs], strength: float) -> list[Image.Image]:
    return draw(bundle, prompts, [0] * len(prompts), settings=settings(strength), inputs=inputs)


def img2img_sheet(folder: Path) -> Image.Image:
    pictures = [picture_of(folder, name) for name, _ in DRAWN_ANEW]
    inputs, prompts = [PictureInputs(picture) for picture in pictures], [prompt for _, prompt in DRAWN_ANEW]
    tiny = bundle_of("tiny")
    columns = [pictures, *(drawn(tiny, prompts, inputs, strength) for strength in STRENGTHS)]
    rows = [list(row) for row in zip(*columns, strict=True)]
    labels = [f"{name}\nas {prompt}" for name, prompt in DRAWN_ANEW]
    return compose_grid(rows, labels, ["picture", *(f"strength {strength:g}" for strength in STRENGTHS)])


def inpaint_sheet(folder: Path, bases: dict[str, str]) -> Image.Image:
    """The first SHOWN of the recipe's held-out pictures; the printed errors are of all."""
    recipe = load_recipe(RECIPE, ["model.base=tiny", f"data.sources.0.path={folder.absolute()}"])
    _, held_out = data_sets(recipe, None, no_progress)
    names, pictures = held_out.captions(), [ImageOps.mirror(picture) for picture in held_out.pictures()]
    inputs = [PictureInputs(picture, mask) for picture, mask in zip(pictures, cycle(masks()), strict=False)]
    grey = Image.new("RGB", (SIDE, SIDE), GREY)
    columns = [pictures, [Image.composite(grey, one.image, one.mask) for one in inputs if one.mask is not None]]
    for label, base in bases.items():
        columns.append(drawn(bundle_of(base), names, inputs, 1.0))
        found = np.array([errors(picture, given) for picture, given in zip(columns[-1], inputs, strict=True)])
        means, deviations = found.mean(0), found.std(0, ddof=1) / len(found) ** 0.5
        told = [f"{mean:.1f} ± {own:.1f}" for mean, own in zip(means, deviations, strict=True)]
        print(f"{label}: within the mask {told[0]}, around it {told[1]} (standard errors, {len(found)} pictures)")
    rows = [list(row) for row in zip(*columns, strict=True)]
    return compose_grid(rows[:SHOWN], names[:SHOWN], ["picture", "masked", *bases])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="openmoji.py's folder `color`")
    parser.add_argument("--inpainting", required=True, help="the trained inpainting base")
    parser.add_argument("--fresh", required=True, help="what its training began with")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two sheets")
    arguments = parser.parse_args()
    img2img_sheet(arguments.pictures).quantize(256).save(arguments.out / "img2img.png", optimize=True)
    bases = {"before training": arguments.fresh, "trained": arguments.inpainting, "tiny base, sees no mask": "tiny"}
    inpaint_sheet(arguments.pictures, bases).quantize(256).save(arguments.out / "inpaint.png", optimize=True)


if __name__ == "__main__":
    main()
