"""What a network computes with an adapter: by our own ΔW, and as the library that owns a format loads the file.

Everything in float64, where rounding is far below any real difference: adapters' fp16, bf16 and fp32 numbers are exact
in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kit.adapters import AdapterState
from lora_kit.adapters.updates.dora import NORM_FLOOR
from lora_kit.models import ModelBundle, load_bundle
from lora_kit.recipe import ModelSection

# Each of at most 60 layers in sequence sums at most 576 products; norms in between keep what is added in proportion.
TOLERANCE = 60 * 576 * torch.finfo(torch.float64).eps


class Outputs(NamedTuple):
    states: Tensor
    """Of the text encoder."""
    noise: Tensor
    """Of the UNet, from states of its own, so that each network is compared by itself."""


@torch.no_grad()
def outputs(unet: Any, text_encoder: Any) -> Outputs:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    context = torch.randn(2, 77, 32, generator=generator, dtype=torch.float64)
    ids = torch.randint(text_encoder.config.vocab_size, (2, 77), generator=generator)
    states = text_encoder(ids).last_hidden_state
    return Outputs(states, unet(latents, torch.tensor([10, 900]), context).sample)


def double_bundle(base: Path) -> ModelBundle:
    return load_bundle(ModelSection(base=str(base)), torch.float64)


@torch.no_grad()
def outputs_by_weight(base: Path, state: AdapterState) -> Outputs:
    """W + ΔW in every weight, by `Update.weight_delta` at strength 1."""
    bundle = double_bundle(base)
    for name, update in state.updates.items():
        component, _, inner = name.partition(".")
        weight = bundle.components[component].get_parameter(f"{inner}.weight")
        delta = update.weight_delta(1.0, weight.detach().clone(), torch.float64)
        assert delta is not None
        weight += delta.reshape(weight.shape)
    return outputs(bundle.unet, bundle.text_encoder)


def double_pipeline(base: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(base).to(dtype=torch.float64)


def outputs_of_diffusers(base: Path, path: Path) -> Outputs:
    """As `pipe.load_lora_weights` loads the file."""
    pipe = double_pipeline(base)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="style")
    return outputs(pipe.unet, pipe.text_encoder)


def assert_same(got: Outputs, expected: Outputs, tolerance: float = TOLERANCE) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def dora_tolerance(state: AdapterState) -> float:
    """Of 60 layers in sequence: LyCORIS (and so the neutral form) adds fp32's eps to each row's norm, PEFT does not.

    Magnitudes are at least the rows' norms in these tests, and at most twice.
    """
    magnitudes = [update.parts()["magnitude"] for update in state.updates.values() if "magnitude" in update.parts()]
    return 60 * NORM_FLOOR / min(float(one.min()) / 2 for one in magnitudes)
