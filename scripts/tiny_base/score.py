"""How often a base's picture of a name is nearest to the true picture of that name.

    python scripts/tiny_base/score.py --base tiny --pictures data/openmoji/color --kinds nature food

The distance is `lora_kit.training.validation.figures.retrieval`'s, in colour, among the pictures of the chosen kinds.
Retrieval and mean chroma do not see hue, so that is measured too: the mean angle between the a, b components
(CIE Lab) of coloured pixels, for the drawn pictures and for the VAE's own reconstructions of the true ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms

from lora_kit.data.pictures import picture_tensor
from lora_kit.inference import SamplingSettings, draw
from lora_kit.inference.sampling import decode, to_pictures
from lora_kit.models import ModelBundle, load_bundle
from lora_kit.progress import progress
from lora_kit.recipe import ModelSection
from lora_kit.training.validation.figures import mean_saturation, retrieval


def lab(picture: Image.Image) -> np.ndarray:
    """CIE Lab, float [h, w, 3], a and b around 0."""
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    converted = ImageCms.applyTransform(picture.convert("RGB"), to_lab)
    assert converted is not None
    values = np.asarray(converted).astype(np.float64)
    values[..., 1:] = (values[..., 1:] + 128) % 256 - 128  # Pillow keeps a and b as signed bytes
    return values


def hue_error(drawn: list[Image.Image], references: list[Image.Image]) -> float:
    """Mean absolute difference of hue angle, degrees, over pixels that are coloured (chroma > 20) in both."""
    angles = []
    for one, other in zip(drawn, references, strict=True):
        a, b = lab(one)[..., 1:], lab(other)[..., 1:]
        coloured = (np.hypot(*a.transpose(2, 0, 1)) > 20) & (np.hypot(*b.transpose(2, 0, 1)) > 20)
        difference = np.arctan2(a[..., 1], a[..., 0]) - np.arctan2(b[..., 1], b[..., 0])
        angles.append(np.degrees(np.abs((difference + np.pi) % (2 * np.pi) - np.pi))[coloured])
    return float(np.concatenate(angles).mean())


@torch.no_grad()
def reconstructed(bundle: ModelBundle, pictures: list[Image.Image]) -> list[Image.Image]:
    """What the VAE alone makes of the pictures."""
    made = []
    for picture in pictures:
        mean, _ = bundle.family.encode(bundle, picture_tensor(picture, 64)[None])
        made += to_pictures(decode(bundle, mean * bundle.vae.config.scaling_factor))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--pictures", type=Path, default=Path("data/openmoji/color"))
    parser.add_argument("--kinds", nargs="+", default=["nature", "food"])
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    rows = [json.loads(line) for line in (arguments.pictures / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] in arguments.kinds]
    references = [Image.open(arguments.pictures / row["file_name"]).convert("RGB") for row in rows]
    bundle = load_bundle(ModelSection(base=arguments.base))
    settings = SamplingSettings(steps=20, guidance=arguments.guidance, width=64, height=64)
    captions = [row["text"] for row in rows]
    drawn = draw(bundle, captions, [arguments.seed] * len(rows), settings=settings, progress=progress)
    vae = reconstructed(bundle, references)
    errors = [
        np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).mean() for a, b in zip(drawn, references, strict=True)
    ]
    for name, gray in (("colour", False), ("grey", True)):
        found = retrieval(drawn, references, gray)
        print(f"{name}: top-1 {found.top1:.1%}, top-5 {found.top5:.1%} of {found.pictures}")
    print(f"chroma {mean_saturation(drawn):.2f}, true pictures {mean_saturation(references):.2f}")
    print(f"hue error {hue_error(drawn, references):.1f} degrees, the VAE alone {hue_error(vae, references):.1f}")
    print(f"mean absolute error {np.mean(errors):.2f} of 255")


if __name__ == "__main__":
    main()
