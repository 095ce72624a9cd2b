"""What `generate` and `grid` take of pictures and samplers, checked before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

from lora_kit.cli.options import DtypeName, PredictionName
from lora_kit.errors import RecipeError

SAMPLER_HELP = "ddim, ddpm, dpm++, dpm++-sde, euler, euler-a, heun, pndm or unipc."

# Options of both `generate` and `grid`; each command's function gives the default.
Base = Annotated[str, typer.Argument(help="A diffusers folder, a checkpoint file, a hub id, or `tiny`.")]
Prompt = Annotated[
    list[str] | None,
    typer.Option(help="What to draw. May be given several times. A super-resolution base takes none, but --image."),
]
Negative = Annotated[str, typer.Option(help="Negative prompt.")]
Scale = Annotated[
    list[str] | None,
    typer.Option(
        help="PATTERN=NUMBER, such as unet.up_blocks.**=0.6: multiplies the strength of what it matches; the last "
        "match decides. May be given several times."
    ),
]
BlockWeights = Annotated[
    str | None,
    typer.Option(
        help="17 or 26 numbers with commas between, as in sd-webui-lora-block-weight; --scale goes over them."
    ),
]
Embedding = Annotated[
    list[str] | None,
    typer.Option(
        help="Learned token (textual inversion): FILE, or TOKEN=FILE to name it anew; prompts say the token. May be "
        "given several times."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Sampler steps.")]
Guidance = Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 or less turns it off.")]
Sampler = Annotated[str, typer.Option(help=SAMPLER_HELP)]
Eta = Annotated[
    float, typer.Option(min=0, max=1, help="Noise that ddim adds on the way: 0 is none, 1 is as much as ddpm's.")
]
Image = Annotated[
    list[Path] | None,
    typer.Option(help="Picture to begin at, or to enlarge; one for all prompts, or given once for each."),
]
Mask = Annotated[
    list[Path] | None,
    typer.Option(
        help="What of the picture is drawn anew (white); the rest is kept. In the picture's size; as many as pictures."
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(help="How much of the picture is drawn anew, above 0 to 1. Default: 0.8, with a mask 1."),
]
LongPrompts = Annotated[
    Literal["cut", "chunks"],
    typer.Option(help="Prompts of more than 75 tokens: cut their end off, or encode them in chunks, as web UIs do."),
]
Prediction = Annotated[
    PredictionName | None,
    typer.Option(help="What the base predicts. Default: what it says itself; a single file of SD2 may not say it."),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or hub id of the CLIP tokenizer, for a single file, which carries none.")
]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Pictures drawn at once. It changes them by rounding only. Default: as many as fit the memory at hand.",
    ),
]
Dtype = Annotated[DtypeName | None, typer.Option(help="Default: fp16 on a GPU, else fp32.")]

HELP_GROUPS = {
    "What is drawn": ("prompt", "negative", "seed", "seeds", "count", "size", "out", "overwrite"),
    "Adapters and learned tokens": ("adapter", "scales", "scale", "block_weights", "embedding"),
    "From a picture": ("image", "mask", "strength"),
    "Sampler": ("steps", "guidance", "sampler", "eta"),
    "Base and machine": ("prediction_type", "tokenizer", "long_prompts", "dtype", "batch_size"),
}
"""Headings of the help of `generate` and `grid`."""


class PictureOptions(NamedTuple):
    """`--image`, `--mask`, `--strength`."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    strength: float | None

    def facts(self) -> dict[str, str]:
        """For a picture's PNG: names without their folders."""
        told = {
            "images": ", ".join(path.name for path in self.images),
            "masks": ", ".join(path.name for path in self.masks),
            "strength": "" if self.strength is None else f"{self.strength:g}",
        }
        return {key: value for key, value in told.items() if value}


def prompts_or_pictures(prompt: Sequence[str] | None, image: Sequence[Path] | None) -> list[str]:
    """The prompts, or an empty one for each picture. Raises RecipeError where neither is given."""
    if not prompt and not image:
        raise RecipeError("say what to draw with --prompt; a base that enlarges pictures takes --image instead")
    return list(prompt or [""] * len(image or ()))


def picture_options(
    image: Sequence[Path] | None, mask: Sequence[Path] | None, strength: float | None, prompts: int
) -> PictureOptions:
    """The options, each picture in its prompt's place. Raises RecipeError for numbers that do not go together."""
    images, masks = tuple(image or ()), tuple(mask or ())
    if not images and (masks or strength is not None):
        option = "--mask" if masks else "--strength"
        raise RecipeError(f"{option} is about a picture to begin at: give one with --image, or leave it out")
    if len(images) not in (0, 1, prompts):
        raise RecipeError(f"got {len(images)} --image for {prompts} prompts; allowed: one for all, or one for each")
    if masks and len(masks) not in (1, len(images)):
        raise RecipeError(f"got {len(masks)} --mask for {len(images)} --image; allowed: one for all, or one for each")
    images *= prompts if len(images) == 1 else 1
    return PictureOptions(images, masks * len(images) if len(masks) == 1 else masks, strength)
