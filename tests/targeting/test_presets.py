from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from lora_kit.recipe import PresetRules
from lora_kit.targeting import ModuleInfo, make_plan


def _picked(preset: str, tree: list[ModuleInfo], text_encoder: bool = False) -> list[str]:
    rules = PresetRules.model_validate({"preset": preset, "text_encoder": text_encoder})
    return [target.module.name for target in make_plan(rules, tree).targets]


@pytest.mark.parametrize(
    ("preset", "count"), [("attention", 128), ("kohya", 192), ("kohya-conv", 278), ("all-linear", 184), ("all", 282)]
)
def test_count_on_sd1(preset: str, count: int, sd1_tree: list[ModuleInfo]) -> None:
    assert len(_picked(preset, sd1_tree)) == count


@pytest.mark.parametrize(
    ("preset", "count"), [("attention", 128), ("kohya", 192), ("kohya-conv", 278), ("all-linear", 216), ("all", 282)]
)
def test_count_on_sd2(preset: str, count: int, sd2_tree: list[ModuleInfo]) -> None:
    assert len(_picked(preset, sd2_tree)) == count


def test_text_encoder_adds_72_modules_on_sd1(sd1_tree: list[ModuleInfo]) -> None:
    assert len(_picked("kohya", sd1_tree, text_encoder=True)) == 192 + 72


def test_text_encoder_adds_138_modules_on_sd2(sd2_tree: list[ModuleInfo]) -> None:
    assert len(_picked("kohya", sd2_tree, text_encoder=True)) == 192 + 138


def _within_classes(unet: nn.Module, classes: set[str]) -> set[str]:
    """sd-scripts' search: every Linear and Conv2d inside a module of one of `classes`."""
    return {
        f"unet.{outer}.{inner}"
        for outer, block in unet.named_modules()
        if type(block).__name__ in classes
        for inner, module in block.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


@pytest.mark.parametrize(
    ("preset", "classes"),
    [
        ("kohya", {"Transformer2DModel"}),
        ("kohya-conv", {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"}),
    ],
)
@pytest.mark.parametrize("linear", [False, True])
def test_kohya_presets_are_the_search_by_class(
    preset: str, classes: set[str], linear: bool, request: pytest.FixtureRequest
) -> None:
    tree = request.getfixturevalue("sd2_tree" if linear else "sd1_tree")
    heads: Any = [5, 10, 20, 20] if linear else 8
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=heads, use_linear_projection=linear)
    assert set(_picked(preset, tree)) == _within_classes(unet, classes)


def test_shared_values_reach_every_target(sd1_tree: list[ModuleInfo]) -> None:
    rules = PresetRules(preset="kohya-conv", text_encoder=True, rank=4, alpha=2, dropout=0.1, lr_scale=0.5)
    given = {target[2:7] for target in make_plan(rules, sd1_tree).targets}
    assert given == {("lora", 4, 2.0, 0.1, 0.5)}
