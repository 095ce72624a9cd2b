"""LDM super-resolution: recognised, laid out, told pictures, and drawn as diffusers draws it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_super_resolution import REAL_UNET, REAL_VQVAE, SCHEDULE

from lora_kit.errors import ModelError, RecipeError
from lora_kit.inference import PictureInputs, SamplingSettings, draw
from lora_kit.models import ModelBundle, load_bundle, pipeline, skeleton
from lora_kit.models.architecture import UnknownArchitectureError
from lora_kit.models.family.super_resolution import pipeline_picture_size, recognise_super_resolution
from lora_kit.models.known_trees import known_trees
from lora_kit.models.outline import read_outline
from lora_kit.models.plain_unet_tree import plain_unet_tree
from lora_kit.recipe import ModelSection, PresetRules
from lora_kit.targeting import make_plan, module_tree


@pytest.fixture
def small(tiny_super_resolution_folder: Path) -> ModelBundle:
    return load_bundle(ModelSection(base=str(tiny_super_resolution_folder)))


@pytest.fixture
def real_folder(tmp_path: Path) -> Path:
    """The published model's configs, without weights."""
    index: dict[str, Any] = {"_class_name": "LDMSuperResolutionPipeline"}
    configs = {"unet": (REAL_UNET, "config"), "vqvae": (REAL_VQVAE, "config")}
    for name, (config, stem) in (configs | {"scheduler": (SCHEDULE, "scheduler_config")}).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{stem}.json").write_text(json.dumps(config))
        index[name] = ["diffusers", config["_class_name"]]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def grey_ramp(width: int, height: int) -> Image.Image:
    down, across = np.mgrid[0:height, 0:width]
    values = np.stack([255 * across / width, 255 * down / height, 128 + 0 * down], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


def test_a_folder_is_recognised_and_has_no_text(small: ModelBundle) -> None:
    assert small.family.name == "ldm_super_resolution"
    assert (small.text_encoder, small.tokenizer, list(small.components)) == (None, None, ["unet"])
    assert type(small.unet).__name__ == "UNet2DModel"
    assert type(small.vae).__name__ == "VQModel"


@pytest.mark.parametrize(
    ("preset", "modules", "parameters"),
    # 2 + 1 + 3 attention blocks of four projections; 22 residual blocks with a time projection, the time embedding's
    # two; those 22 blocks' two convolutions, 14 shortcuts, 3 + 3 resamplers, first and last.
    [("attention", 24, 4 * 24 * (640 + 640)), ("all-linear", 48, 0), ("all", 48 + 66, 0)],
)
def test_presets_on_the_published_models_configs(real_folder: Path, preset: Any, modules: int, parameters: int) -> None:
    outline = read_outline(ModelSection(base=str(real_folder)))
    plan = make_plan(PresetRules(preset=preset, rank=4), outline.tree)
    assert len(plan.targets) == modules
    assert outline.side_step == 32  # three halvings of a quarter
    if parameters:
        assert plan.trainable_parameters == parameters
    kinds = {target.module.kind for target in plan.targets}
    assert kinds == ({"linear", "conv"} if preset == "all" else {"linear"})


def test_the_layout_counts_what_the_networks_hold(real_folder: Path) -> None:
    outline = read_outline(ModelSection(base=str(real_folder)))
    laid_out = skeleton(ModelSection(base=str(real_folder)))
    assert outline.tree == module_tree(laid_out.components)
    assert outline.parameters == {
        "unet": sum(weight.numel() for weight in laid_out.unet.parameters()),
        "vae": sum(weight.numel() for weight in laid_out.vae.parameters()),
    }


def test_latents_are_the_first_stages_before_quantisation_unscaled(small: ModelBundle) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = small.family.encode(small, pixels)
    with torch.no_grad():
        encoded = small.vae.encode(pixels).latents
    assert torch.equal(mean, encoded)
    assert not std.any()
    assert torch.equal(small.family.target_latents(small, mean, std, torch.randn_like(mean)), mean)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "pndm"])
def test_pictures_are_those_of_diffusers_pipeline(small: ModelBundle, sampler: str) -> None:
    picture = grey_ramp(64, 32)
    settings = SamplingSettings(steps=4, width=256, height=128, sampler=sampler)
    (drawn,) = draw(small, [""], [5], settings=settings, inputs=[PictureInputs(picture)])
    pipe = pipeline(small, sampler)
    wanted = pipe(picture, num_inference_steps=4, generator=torch.Generator().manual_seed(5)).images[0]
    assert drawn.size == wanted.size == (256, 128)
    assert np.asarray(wanted).std() > 10  # a picture, not a plane
    # fp32 both times; a value near the middle between two levels may round to the other one.
    assert np.abs(np.asarray(drawn, np.int16) - np.asarray(wanted, np.int16)).max() <= 1


def test_a_pictures_noise_does_not_depend_on_its_batch(small: ModelBundle) -> None:
    settings = SamplingSettings(steps=2, width=32, height=32)
    inputs = [PictureInputs(grey_ramp(8, 8)), PictureInputs(grey_ramp(8, 8).rotate(90))]
    together = draw(small, ["", ""], [1, 2], settings=settings, inputs=inputs)
    alone = [draw(small, [""], [i + 1], settings=settings, inputs=[inputs[i]])[0] for i in range(2)]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 3}, "takes 3 channels and gives 3. Super-resolution takes 6"),
        ({"num_class_embeds": 10}, "class-conditional"),
    ],
)
def test_other_networks_without_text_are_refused(changes: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        recognise_super_resolution({**REAL_UNET, **changes}, REAL_VQVAE, "base")


def test_a_pipeline_of_other_parts_is_refused(tiny_super_resolution_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_super_resolution_folder, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(ModelError, match="whose unet is a UNet2DConditionModel; supported so far: UNet2DModel"):
        load_bundle(ModelSection(base=str(folder)))
    del index["vqvae"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names no vqvae"):
        load_bundle(ModelSection(base=str(folder)))


def test_what_it_cannot_draw_from_is_refused(small: ModelBundle) -> None:
    settings = SamplingSettings(steps=1, width=32, height=32)
    given = [PictureInputs(grey_ramp(8, 8))]
    with pytest.raises(RecipeError, match="enlarges pictures: give it one"):
        draw(small, [""], [0], settings=settings)
    with pytest.raises(RecipeError, match="reads no text, and got the prompt 'a cat'"):
        draw(small, ["a cat"], [0], settings=settings, inputs=given)
    with pytest.raises(RecipeError, match="takes no mask"):
        draw(small, [""], [0], settings=settings, inputs=[PictureInputs(grey_ramp(8, 8), Image.new("L", (8, 8)))])
    with pytest.raises(RecipeError, match=r"strength: got 0\.5"):
        strong = SamplingSettings(steps=4, width=32, height=32, strength=0.5)
        draw(small, [""], [0], settings=strong, inputs=given)
    with pytest.raises(RecipeError, match="7x8 pixels; this base takes multiples of 2"):
        draw(small, [""], [0], settings=settings, inputs=[PictureInputs(grey_ramp(7, 8))])


def test_the_pipelines_own_size_of_a_picture() -> None:
    assert pipeline_picture_size((100, 64), "base") == (96, 64)
    with pytest.raises(RecipeError, match="31x40 pixels; base enlarges pictures of at least 32x32"):
        pipeline_picture_size((31, 40), "base")


def test_the_tree_from_the_config_is_the_networks(real_folder: Path, small: ModelBundle) -> None:
    laid_out = skeleton(ModelSection(base=str(real_folder)))
    assert plain_unet_tree(REAL_UNET) == module_tree(laid_out.components)
    assert plain_unet_tree(dict(small.unet.config)) == module_tree(small.components)
    assert list(known_trees()["ldm_super_resolution"]) == plain_unet_tree(REAL_UNET)
    with pytest.raises(UnknownArchitectureError):
        plain_unet_tree({**REAL_UNET, "downsample_type": "resnet"})
