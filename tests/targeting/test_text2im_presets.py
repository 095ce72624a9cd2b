"""What presets pick of the published LDM text-to-image base, laid out from its config without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

from lora_kit.cli.main import main
from lora_kit.models.known_trees import known_trees
from lora_kit.recipe import PresetRules
from lora_kit.targeting import ModuleInfo, make_plan, module_tree

WIDTHS = (320, 640, 1280, 1280)
UNET: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": WIDTHS,
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
}
BERT: dict[str, Any] = {"d_model": 1280, "encoder_layers": 32, "encoder_ffn_dim": 5120}
FIRST_STAGE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}
"""CompVis' txt2img-1p4B-eval.yaml, as diffusers' convert_from_ckpt.py says it."""

TRANSFORMERS = {320: 2 + 3, 640: 2 + 3, 1280: 2 + 1 + 3}
"""Width → transformers of the down, middle and up path."""
RESIDUALS = 4 * 2 + 2 + 4 * 3
SHORTCUTS = 2 + 4 * 3  # where widths change on the way down; the skips change every one on the way up
RESIZERS = 3 + 3
EMBEDDING = 2
BLOCKS = sum(TRANSFORMERS.values())
COUNTS = {
    "attention": 8 * BLOCKS,
    "kohya": (8 + 2 + 2) * BLOCKS,
    "kohya-conv": 12 * BLOCKS + 3 * RESIDUALS + SHORTCUTS + RESIZERS,
    "all-linear": (8 + 2) * BLOCKS + RESIDUALS + EMBEDDING,
    "all": 12 * BLOCKS + 3 * RESIDUALS + SHORTCUTS + RESIZERS + EMBEDDING + 2,
}
LAYERS, RANK = 32, 4


@pytest.fixture(scope="module")
def tree() -> list[ModuleInfo]:
    with torch.device("meta"):
        return module_tree({"unet": UNet2DConditionModel(**UNET), "text_encoder": LDMBertModel(LDMBertConfig(**BERT))})


def test_the_known_tree_is_the_networks(tree: list[ModuleInfo]) -> None:
    assert list(known_trees()["ldm_text2im"]) == tree


@pytest.mark.parametrize("preset", list(COUNTS))
def test_presets_mean_the_same_thing_as_on_stable_diffusion(preset: Any, tree: list[ModuleInfo]) -> None:
    plan = make_plan(PresetRules(preset=preset, rank=RANK, text_encoder=True), tree)
    picked = [target.module for target in plan.targets]
    assert sum(module.component == "unet" for module in picked) == COUNTS[preset]
    assert sum(module.component == "text_encoder" for module in picked) == 6 * LAYERS
    sd1 = make_plan(PresetRules(preset=preset, rank=RANK), known_trees()["sd1"])
    assert [m.name for m in picked if m.component == "unet"] == [target.module.name for target in sd1.targets]


def test_trainable_parameters_by_hand(tree: list[ModuleInfo]) -> None:
    plan = make_plan(PresetRules(preset="attention", rank=RANK, text_encoder=True), tree)
    by_component = {"unet": 0, "text_encoder": 0}
    for target in plan.targets:
        by_component[target.module.component] += target.parameters
    # Self-attention: four of [w, w]. Cross-attention: q and out of [w, w], k and v of [w, 1280].
    unet = sum(count * RANK * (6 * 2 * width + 2 * (width + 1280)) for width, count in TRANSFORMERS.items())
    heads, width, middle = 8 * 64, 1280, 5120
    assert by_component["unet"] == unet
    assert by_component["text_encoder"] == LAYERS * RANK * (4 * (heads + width) + 2 * (width + middle))


def test_plan_reads_configs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "ldm-text2im-large-256"
    index = {
        "_class_name": "LDMTextToImagePipeline",
        "bert": ["latent_diffusion", "LDMBertModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vqvae": ["diffusers", "AutoencoderKL"],
    }
    with torch.device("meta"):
        configs: dict[str, Any] = {
            "unet/config.json": dict(UNet2DConditionModel(**UNET).config),
            "vqvae/config.json": dict(AutoencoderKL(**FIRST_STAGE).config),
        }
    configs |= {"bert/config.json": LDMBertConfig(**BERT).to_dict(), "scheduler/scheduler_config.json": {}}
    for name, content in (configs | {"model_index.json": index}).items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(json.dumps(content))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    recipe = {
        "model": {"base": str(base)},
        "targets": {"preset": "all", "rank": RANK, "text_encoder": True},
        "data": {"sources": [{"path": str(pictures)}], "resolution": 256},
    }
    from PIL import Image

    Image.new("RGB", (256, 256)).save(pictures / "a.png")
    (pictures / "a.txt").write_text("a cat")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(tmp_path / "recipe.yaml"), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    assert len(document["plan"]["targets"]) == COUNTS["all"] + 6 * LAYERS
