"""What `plan` makes of the published configs: modules, presets and parameters, counted a second time by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ldm_reference import SD15, SD21, Size, clip_shapes, open_clip_shapes, unet_shapes
from PIL import Image
from real_configs import PUBLISHED

from lora_kit.cli.main import main
from lora_kit.models import skeleton
from lora_kit.models.outline import Outline, read_outline
from lora_kit.recipe import ModelSection, PresetRules
from lora_kit.targeting import TargetPlan, make_plan, module_tree

NAMES = [name for name in PUBLISHED if "inpainting" not in name]
RANK = 4


class Counts(NamedTuple):
    """Modules that each preset picks."""

    attention: int
    kohya: int
    kohya_conv: int
    all_linear: int
    everything: int


def counted(unet: dict[str, Any]) -> Counts:
    """From the architecture (Rombach et al. 2022, and the LDM code): what a U-Net of this config consists of."""
    levels, layers = len(unet["block_out_channels"]), unet["layers_per_block"]
    attending = sum(kind.startswith("CrossAttn") for kind in unet["down_block_types"])
    transformers = attending * layers + attending * (layers + 1) + 1  # down, up, middle
    in_attention, in_feed_forward, projections = 2 * 4 * transformers, 2 * transformers, 2 * transformers
    residuals = levels * layers + levels * (layers + 1) + 2
    wider = sum(a != b for a, b in zip(unet["block_out_channels"], unet["block_out_channels"][1:], strict=False))
    shortcuts = wider + levels * (layers + 1)  # where the width changes; on the way up a skip comes in everywhere
    resizing = 2 * (levels - 1)
    linear_projections = projections if unet.get("use_linear_projection") else 0
    kohya = in_attention + in_feed_forward + projections
    kohya_conv = kohya + 3 * residuals + shortcuts + resizing  # two convolutions and the time's linear each
    time_and_ends = 2 + 2  # two linears of the time's embedding; the first and the last convolution
    return Counts(
        in_attention,
        kohya,
        kohya_conv,
        in_attention + in_feed_forward + linear_projections + residuals + 2,
        kohya_conv + time_and_ends,
    )


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PUBLISHED[name].write(tmp_path_factory.mktemp("published") / name)


@pytest.fixture(scope="module")
def described(base: Path) -> Outline:
    return read_outline(ModelSection(base=str(base)))


def planned(described: Outline, preset: str, text_encoder: bool) -> TargetPlan:
    rules = PresetRules.model_validate({"preset": preset, "text_encoder": text_encoder, "rank": RANK, "alpha": RANK})
    return make_plan(rules, described.tree)


@pytest.mark.parametrize("text_encoder", [False, True])
def test_presets_pick_the_same_layers_of_every_base(name: str, described: Outline, text_encoder: bool) -> None:
    wanted = counted(PUBLISHED[name].unet)
    layers = PUBLISHED[name].text_encoder["num_hidden_layers"] * text_encoder
    # Every preset takes what sd-scripts takes of a text layer: four linears of attention, two of the feed-forward.
    presets = {"attention": "attention", "kohya": "kohya", "kohya_conv": "kohya-conv"}
    presets |= {"all_linear": "all-linear", "everything": "all"}
    for field, preset in presets.items():
        picked = Counter(target.module.component for target in planned(described, preset, text_encoder).targets)
        assert picked["unet"] == getattr(wanted, field), preset
        assert picked["text_encoder"] == 6 * layers, preset


def test_the_counts_are_those_of_sd_scripts(described: Outline) -> None:
    """sd-scripts says `create LoRA for U-Net: 192 modules` of SD1 and SD2, 278 with its 3 × 3 convolutions."""
    assert len(planned(described, "kohya", False).targets) == 192
    assert len(planned(described, "kohya-conv", False).targets) == 278


def test_trainable_parameters_are_those_of_the_ldm_networks_shapes(name: str, described: Outline) -> None:
    """Rank × (inputs × kernel + outputs) for every matrix and kernel that CompVis' and OpenCLIP's code registers."""
    size: Size = SD15 if name == "sd1" else SD21._replace(text_layers=23)
    text = clip_shapes(size) if name == "sd1" else open_clip_shapes(size)
    embeddings = ("token_embedding", "position", "text_projection", "attn_mask", "logit_scale")
    weights = {
        **{key: shape for key, shape in unet_shapes(size).items() if len(shape) > 1},
        **{key: shape for key, shape in text.items() if len(shape) > 1 and not any(one in key for one in embeddings)},
    }
    numbers = 0
    for key, (outputs, inputs, *kernel) in weights.items():
        packed = 3 if "in_proj" in key else 1  # OpenCLIP has q, k and v in one matrix: three adapters
        window = kernel[0] * kernel[1] if kernel else 1
        numbers += RANK * (packed * inputs * window + outputs)
    assert planned(described, "all", True).trainable_parameters == numbers


def test_the_networks_that_diffusers_builds_have_these_modules(base: Path, described: Outline) -> None:
    bundle = skeleton(ModelSection(base=str(base)))
    assert module_tree(bundle.components) == described.tree
    assert (bundle.prediction_type, bundle.unet.config.sample_size) == (
        described.prediction_type,
        PUBLISHED[base.name].unet["sample_size"],
    )


def test_the_family_and_what_it_predicts(name: str, base: Path) -> None:
    bundle = skeleton(ModelSection(base=str(base)))
    assert bundle.family.name == name[:3]
    assert bundle.prediction_type == ("v_prediction" if name.endswith("-v") else "epsilon")


@pytest.mark.parametrize("preset", ["attention", "all"])
def test_the_plan_command_reads_it(
    preset: str, name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a picture")
    recipe = {"model": {"base": str(base)}, "data": {"sources": [{"path": str(tmp_path)}]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"targets": {"preset": preset, "text_encoder": True}}))
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(tmp_path / "recipe.yaml"), "--json"])
    assert caught.value.code == 0
    picked = {target["module"]["name"] for target in json.loads(capsys.readouterr().out)["plan"]["targets"]}
    layers = PUBLISHED[name].text_encoder["num_hidden_layers"]
    counts = counted(PUBLISHED[name].unet)
    assert len(picked) == {"attention": counts.attention, "all": counts.everything}[preset] + 6 * layers


def test_the_recipe_of_v_fits_the_published_config(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """recipes/sd21_v.yaml on the v models; on those that predict the noise it is refused, with the reason."""
    (tmp_path / "recipes" / "pictures").mkdir(parents=True)
    Image.new("RGB", (768, 768)).save(tmp_path / "recipes" / "pictures" / "a.png")
    (tmp_path / "recipes" / "pictures" / "a.txt").write_text("a picture")
    recipe = Path(__file__).parents[2] / "recipes" / "sd21_v.yaml"
    (tmp_path / "recipes" / "sd21_v.yaml").write_text(recipe.read_text())
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(tmp_path / "recipes" / "sd21_v.yaml"), f"model.base={base}", "--json"])
    told = capsys.readouterr()
    if name.endswith("-v"):
        assert caught.value.code == 0
        assert len(json.loads(told.out)["plan"]["targets"]) == counted(PUBLISHED[name].unet).attention
    else:
        assert caught.value.code == 2
        assert "zero_terminal_snr" in told.err
