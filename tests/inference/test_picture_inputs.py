"""Drawing from a picture, and from a picture and a mask: equal to diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_samples import bundle_of
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw

from lora_kit.errors import RecipeError
from lora_kit.inference import SamplingSettings, draw
from lora_kit.models import ModelBundle, scheduler_named
from lora_kit.models.family.picture_inputs import PictureInputs
from lora_kit.models.pipelines import SCHEDULERS

PROMPT, SEED = "red apple", 3
SMALL = SamplingSettings(steps=4, width=16, height=16, guidance=3.0)


def picture(size: tuple[int, int] = (16, 16)) -> Image.Image:
    image = Image.new("RGB", size, (200, 220, 240))
    ImageDraw.Draw(image).ellipse((3, 2, 12, 13), fill=(180, 40, 60))
    return image


def mask(size: tuple[int, int] = (16, 16)) -> Image.Image:
    image = Image.new("L", size)
    ImageDraw.Draw(image).rectangle((4, 3, 11, 9), fill=255)
    return image


def theirs(kind: Any, bundle: ModelBundle, sampler: str, **inputs: Any) -> np.ndarray:
    """One picture by diffusers' pipeline of the bundle's networks, uint8 [H, W, 3]."""
    config = {**bundle.scheduler_config, "prediction_type": bundle.prediction_type}
    pipe = kind(
        vae=bundle.vae,
        text_encoder=bundle.text_encoder,
        tokenizer=bundle.tokenizer,
        unet=bundle.unet,
        scheduler=scheduler_named(sampler, config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": SMALL.steps, "guidance_scale": SMALL.guidance, "image": picture(), **inputs}
    (drawn,) = pipe(PROMPT, generator=[torch.Generator().manual_seed(SEED)], **options).images
    return np.asarray(drawn)


def assert_same(ours: Image.Image, wanted: np.ndarray) -> None:
    """Equal but for values that fall on either side of a rounding to 8 bits."""
    difference = np.abs(np.asarray(ours).astype(int) - wanted.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


STRENGTHS = [*((sampler, 0.5) for sampler in SCHEDULERS), ("ddim", 0.3), ("ddim", 1.0), ("euler", 1.0)]


@pytest.mark.parametrize(("sampler", "strength"), STRENGTHS)
def test_a_picture_with_a_strength_is_diffusers_img2img(bundle: ModelBundle, sampler: str, strength: float) -> None:
    settings = SamplingSettings(steps=4, width=16, height=16, guidance=3.0, sampler=sampler, strength=strength)
    (ours,) = draw(bundle, [PROMPT], [SEED], settings=settings, inputs=[PictureInputs(picture())])
    assert_same(ours, theirs(StableDiffusionImg2ImgPipeline, bundle, sampler, strength=strength))


@pytest.mark.parametrize(("sampler", "strength"), STRENGTHS)
def test_a_mask_on_an_inpainting_base_is_diffusers_own(
    tiny_inpainting_folder: Path, sampler: str, strength: float
) -> None:
    bundle = bundle_of(tiny_inpainting_folder)
    settings = SamplingSettings(steps=4, width=16, height=16, guidance=3.0, sampler=sampler, strength=strength)
    (ours,) = draw(bundle, [PROMPT], [SEED], settings=settings, inputs=[PictureInputs(picture(), mask())])
    wanted = theirs(
        StableDiffusionInpaintPipeline, bundle, sampler, strength=strength, mask_image=mask(), height=16, width=16
    )
    assert_same(ours, wanted)


@pytest.mark.parametrize(("sampler", "strength"), [("ddim", 1.0), ("euler-a", 0.5), ("dpm++-sde", 1.0), ("heun", 0.5)])
def test_a_mask_on_any_other_base_keeps_what_surrounds_it_as_diffusers_does(
    bundle: ModelBundle, sampler: str, strength: float
) -> None:
    settings = SamplingSettings(steps=4, width=16, height=16, guidance=3.0, sampler=sampler, strength=strength)
    (ours,) = draw(bundle, [PROMPT], [SEED], settings=settings, inputs=[PictureInputs(picture(), mask())])
    wanted = theirs(
        StableDiffusionInpaintPipeline, bundle, sampler, strength=strength, mask_image=mask(), height=16, width=16
    )
    assert_same(ours, wanted)


def test_eta_is_ddims_noise(bundle: ModelBundle) -> None:
    def drawn(eta: float) -> Image.Image:
        settings = SamplingSettings(steps=4, width=16, height=16, guidance=3.0, eta=eta, strength=0.5)
        return draw(bundle, [PROMPT], [SEED], settings=settings, inputs=[PictureInputs(picture())])[0]

    assert_same(drawn(1.0), theirs(StableDiffusionImg2ImgPipeline, bundle, "ddim", strength=0.5, eta=1.0))
    assert drawn(1.0).tobytes() != drawn(0.0).tobytes()


def test_how_pictures_are_batched_changes_nothing(tiny_inpainting_folder: Path) -> None:
    bundle = bundle_of(tiny_inpainting_folder)
    inputs = [PictureInputs(picture(), mask()), PictureInputs(picture().rotate(90), mask().rotate(90))]
    together = draw(bundle, [PROMPT, "blue boat"], [1, 2], settings=SMALL, inputs=inputs)
    alone = [
        draw(bundle, [text], [seed], settings=SMALL, inputs=[one])[0]
        for text, seed, one in zip([PROMPT, "blue boat"], [1, 2], inputs, strict=True)
    ]
    for one, other in zip(together, alone, strict=True):
        assert_same(one, np.asarray(other))


@pytest.mark.parametrize(
    ("changes", "inputs", "said"),
    [
        ({}, [PictureInputs(picture(), mask((16, 18)))], "the mask has 16x18 pixels and the picture 16x16"),
        ({}, [PictureInputs(picture((15, 16)))], r"15x16 pixels; .* multiples of 2\. Resize or crop it, to 16x16"),
        ({}, [PictureInputs(picture((32, 16)))], "of 32x16 pixels gives 32x16, and 16x16 are asked for"),
        ({}, [PictureInputs(picture())] * 2, "got 1 prompts and 2 input pictures"),
        ({"strength": 0.2}, [PictureInputs(picture())], "strength: got 0.2, which is less than one of 4 steps"),
        ({"strength": 1.2}, [PictureInputs(picture())], "strength: got 1.2, allowed"),
        ({"strength": 0.5}, None, "strength: got 0.5, which is about an input picture"),
        ({"eta": 0.5, "sampler": "euler"}, None, "eta: got 0.5, which is about the sampler 'ddim', not 'euler'"),
        ({"eta": 1.5}, None, "eta: got 1.5, allowed: 0 to 1"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(
    tiny_sd1_folder: Path, changes: dict[str, Any], inputs: list[PictureInputs] | None, said: str
) -> None:
    settings = SamplingSettings(**({"steps": 4, "width": 16, "height": 16} | changes))
    with pytest.raises(RecipeError, match=said):
        draw(bundle_of(tiny_sd1_folder), [PROMPT], [SEED], settings=settings, inputs=inputs)
