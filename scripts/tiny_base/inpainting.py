"""Make an inpainting variant of a Stable Diffusion base: its UNet's first convolution widened to 9 channels with zeros.

    python scripts/tiny_base/inpainting.py --out runs/tiny-inpainting/fresh

The five new channels are the mask and the latents of the masked picture. Their weights are zero, as those of Stable
Diffusion's own inpainting model were (its model card), so that it draws what its base draws until it is trained, which
inpainting.yaml beside this file does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionInpaintPipeline
from torch import nn

from lora_kit.errors import ModelError
from lora_kit.models import load_bundle, pipeline
from lora_kit.models.family.families import recognise
from lora_kit.recipe import ModelSection


@torch.no_grad()
def widened(convolution: nn.Conv2d, channels: int) -> nn.Conv2d:
    """The convolution [out, in, kh, kw] over `channels` more inputs, which it does not look at."""
    options: Any = {"stride": convolution.stride, "padding": convolution.padding, "dtype": convolution.weight.dtype}
    wide = nn.Conv2d(
        convolution.in_channels + channels, convolution.out_channels, tuple(convolution.kernel_size), **options
    )
    wide.weight.zero_()
    wide.weight[:, : convolution.in_channels] = convolution.weight
    assert convolution.bias is not None and wide.bias is not None
    wide.bias.copy_(convolution.bias)
    return wide


def inpainting_variant(base: str) -> StableDiffusionInpaintPipeline:
    """diffusers' pipeline of the base (a folder, file, hub id, or `tiny`) with a widened UNet."""
    bundle = load_bundle(ModelSection(base=base))
    if bundle.family.sees_mask:
        raise ModelError(f"{base} is an inpainting base already ({bundle.family.name}).")
    latents = bundle.unet.config.in_channels
    bundle.unet.conv_in = widened(bundle.unet.conv_in, latents + 1)
    bundle.unet.register_to_config(in_channels=2 * latents + 1)
    bundle.family = recognise(dict(bundle.unet.config), bundle.text_encoder.config.hidden_size, base)
    return pipeline(bundle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", help="what is widened (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder that is written; must not exist")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already: name another folder")
    inpainting_variant(arguments.base).save_pretrained(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
