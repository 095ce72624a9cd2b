"""Shared fixtures: small random Stable Diffusion pipelines and a folder of captioned pictures. No hub, no network."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before the libraries are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from PIL import Image, ImageDraw
from small_super_resolution import small_super_resolution
from small_tokenizers import SUBJECTS, small_tokenizer
from text2im_samples import small_text2im

from lora_kit.models import ModelBundle, load_bundle
from lora_kit.recipe import ModelSection

if "PYTEST_XDIST_WORKER" in os.environ:  # other workers beside this one: a core each, also for what tests launch
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
else:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """What was imported by now is no work for the collector, as in a command (cli/quick_imports.py). Runs collect
    between their stages: late in a whole suite that made tests that train four times slower."""
    gc.collect()
    gc.freeze()


def _small_pipeline(version: int, fills_masks: bool = False) -> Any:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionInpaintPipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    second = version == 2
    torch.manual_seed(version)
    tokenizer = small_tokenizer("!" if second else "<|endoftext|>")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=9 if fills_masks else 4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=(2, 4) if second else 4,
        use_linear_projection=second,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=0.18215,
    )
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=3 if second else 2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="gelu" if second else "quick_gelu",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if second else "epsilon",
    )
    kind = StableDiffusionInpaintPipeline if fills_masks else StableDiffusionPipeline
    return kind(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def tiny_sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Stable Diffusion v1 as a diffusers folder. Read-only by convention: copy before changing it."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-sd1"
    _small_pipeline(1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_sd1_folder, in v2's shape: linear projections, heads per block, v-prediction."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-sd2"
    _small_pipeline(2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_inpainting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_sd1_folder, for inpainting: a UNet that is given mask and masked picture too."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-inpainting"
    _small_pipeline(1, fills_masks=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_inpainting2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_inpainting_folder, in v2's shape."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-inpainting2"
    _small_pipeline(2, fills_masks=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text2im_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_sd1_folder: a small LDM text-to-image model with LDMBert and a KL first stage."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-text2im"
    small_text2im().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_real_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: name in real_configs.PUBLISHED → a random narrow base with that one's very blocks and layers, each
    made once. Read-only by convention."""
    from real_configs import small_base

    place, made = tmp_path_factory.mktemp("real-bases"), dict[str, Path]()

    def make(name: str) -> Path:
        if name not in made:
            made[name] = small_base(place / name, name)
        return made[name]

    return make


@pytest.fixture(params=["tiny_sd1_folder", "tiny_sd2_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Both generations' small bases, for what holds for either."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def bundle(folder: Path) -> ModelBundle:
    """`folder`, loaded."""
    return load_bundle(ModelSection(base=str(folder)))


def _picture(index: int, size: tuple[int, int]) -> Image.Image:
    """A filled ellipse, different for every index, on a pale ground."""
    width, height = size
    image = Image.new("RGB", size, (240, 240 - 8 * index, 230))
    box = (width // 8 + index, height // 8, width * 7 // 8, height * 7 // 8 - index)
    ImageDraw.Draw(image).ellipse(box, fill=(30 * index % 256, 200 - 20 * index, 60 + 17 * index))
    return image


@pytest.fixture(scope="session")
def make_picture_folder() -> Callable[..., Path]:
    """A function (folder, count=8, size=(40, 48)) → folder of captioned PNGs with metadata.jsonl."""

    def make(folder: Path, count: int = 8, size: tuple[int, int] = (40, 48)) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        for index in range(count):
            name = f"{index:03d}.png"
            _picture(index, size).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": SUBJECTS[index % len(SUBJECTS)]}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory, make_picture_folder: Callable[..., Path]) -> Path:
    """Eight captioned pictures of 40 × 48 pixels. Read-only by convention."""
    return make_picture_folder(tmp_path_factory.mktemp("pictures") / "eight")


@pytest.fixture(scope="session")
def tiny_super_resolution_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random LDM super-resolution model, as tiny_sd1_folder: no text, pictures four times enlarged."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-super-resolution"
    small_super_resolution().save_pretrained(folder)
    return folder
