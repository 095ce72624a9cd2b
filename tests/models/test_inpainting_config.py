"""`plan` on the published inpainting configs: the plain bases' modules, and a wider first convolution."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_configs import PUBLISHED

from lora_kit.models import outline, skeleton
from lora_kit.models.outline import Outline, read_outline
from lora_kit.recipe import ModelSection, PresetRules
from lora_kit.targeting import make_plan, module_tree

NAMES = [name for name in PUBLISHED if "inpainting" in name]
RANK = 4
COUNTS = {"attention": (128, 128), "all-linear": (184, 216), "all": (282, 282)}
"""Of the UNet of v1 and v2, as of the plain bases."""
LAYERS = {"sd1": 12, "sd2": 23}


@pytest.fixture(scope="module", params=NAMES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PUBLISHED[request.param].write(tmp_path_factory.mktemp("published") / request.param)


@pytest.fixture
def described(base: Path, monkeypatch: pytest.MonkeyPatch) -> Outline:
    """From the config alone: falling back to diffusers is a failure."""
    monkeypatch.setattr(outline, "_built", lambda section: pytest.fail(f"{section.base} was built"))
    return read_outline(ModelSection(base=str(base)))


def test_presets_mean_the_same_layers_as_on_the_plain_bases(described: Outline) -> None:
    generation = described.family.removesuffix("-inpainting")
    for preset, counts in COUNTS.items():
        rules = PresetRules.model_validate({"preset": preset, "text_encoder": True, "rank": RANK})
        targets = make_plan(rules, described.tree).targets
        unet = [target for target in targets if target.module.component == "unet"]
        assert len(unet) == counts[generation == "sd2"], preset
        # Every preset takes the four linears of attention and the two of the feed-forward of a text layer.
        assert len(targets) - len(unet) == 6 * LAYERS[generation], preset


def test_the_first_convolution_takes_five_channels_more(described: Outline) -> None:
    generation = described.family.removesuffix("-inpainting")
    # 859,520,964 and 865,910,724 are the plain UNets'; five channels into 320 kernels of 3 × 3.
    plain = {"sd1": 859_520_964, "sd2": 865_910_724}[generation]
    assert described.parameters["unet"] == plain + 5 * 320 * 9


def test_the_networks_that_diffusers_builds_have_these_modules(base: Path, described: Outline) -> None:
    bundle = skeleton(ModelSection(base=str(base)))
    assert module_tree(bundle.components) == described.tree
    assert (bundle.family.name, bundle.prediction_type) == (described.family, "epsilon")
