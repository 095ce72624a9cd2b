"""A single file of SD2 does not tell what it predicts: it is asked for, with what hints there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm_reference import SD15, SD21, unet_shapes
from merge_samples import random_checkpoint
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lora_kit.cli.main import main
from lora_kit.errors import ModelError
from lora_kit.models import outline, skeleton
from lora_kit.models.outline import read_outline
from lora_kit.models.single_file.ldm_prediction import STATISTIC, is_open
from lora_kit.recipe import ModelSection


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    return random_checkpoint(2)


def saved(path: Path, checkpoint: dict[str, Tensor], metadata: dict[str, str] | None = None) -> ModelSection:
    save_file(checkpoint, path, metadata)
    return ModelSection(base=str(path))


def asked(section: ModelSection) -> str:
    with pytest.raises(ModelError) as caught:
        skeleton(section)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("768-v-ema", "v_prediction"),
        ("v2-1_768-ema-pruned", "v_prediction"),
        ("v2-1_768-nonema-pruned", "v_prediction"),
        ("my-vpred-mix", "v_prediction"),
        ("512-base-ema", "epsilon"),
        ("v2-1_512-ema-pruned", "epsilon"),
    ],
)
def test_the_name_of_the_file_is_a_hint_and_no_answer(
    name: str, says: str, checkpoint: dict[str, Tensor], tmp_path: Path
) -> None:
    told = asked(saved(tmp_path / f"{name}.safetensors", checkpoint))
    assert "set model.prediction_type: epsilon (the 512 base) or v_prediction (the 768 model)" in told
    assert "--prediction-type" in told
    hints = [line for line in told.splitlines() if "the file's name has" in line]
    assert len(hints) == 1
    assert hints[0].startswith(f"  {says}: ")


def test_a_name_that_says_nothing_gives_no_hint(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    assert asked(saved(tmp_path / "model.safetensors", checkpoint)).endswith("Nothing about the file hints at either.")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            'model:\n  params:\n    parameterization: "v"\n',
            "v_prediction: model.yaml beside it has parameterization: v",
        ),
        ("model:\n  params:\n    parameterization: eps\n", "epsilon: model.yaml beside it has parameterization: eps"),
        ("model:\n  params: {}\n", "epsilon: model.yaml beside it has no parameterization"),
    ],
)
def test_the_config_that_web_uis_want_beside_it(
    text: str, says: str, checkpoint: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "model.yaml").write_text(text)
    assert says in asked(saved(tmp_path / "model.safetensors", checkpoint))


@pytest.mark.parametrize(("spread", "says"), [(0.12, "v_prediction"), (0.05, "epsilon")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_comfyuis_rule_of_thumb(
    spread: float, says: str, dtype: torch.dtype, checkpoint: dict[str, Tensor], tmp_path: Path
) -> None:
    bias = torch.tensor([spread, -spread] * 160, dtype=dtype)  # their deviation is `spread`
    told = asked(saved(tmp_path / "model.safetensors", {**checkpoint, STATISTIC: bias}))
    assert f"  {says}: a norm's bias has the deviation {spread:.3f}" in told


def test_the_statistic_is_of_a_tensor_that_sd2_has() -> None:
    assert unet_shapes(SD21)[STATISTIC] == (320,)


def test_words_of_a_header_are_a_hint_only(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    told = asked(saved(tmp_path / "model.safetensors", checkpoint, {"modelspec.title": "Mine from 768-v"}))
    assert "v_prediction: its header's modelspec.title (Mine from 768-v) has '768'" in told


@pytest.mark.parametrize(("word", "says"), [("v", "v_prediction"), ("epsilon", "epsilon"), ("sample", "sample")])
def test_a_header_that_says_it_by_the_standard_is_believed(
    word: str, says: str, checkpoint: dict[str, Tensor], tmp_path: Path
) -> None:
    section = saved(tmp_path / "512-base.safetensors", checkpoint, {"modelspec.prediction_type": word})
    assert skeleton(section).prediction_type == says
    assert read_outline(section).prediction_type == says


def test_the_recipe_goes_over_the_header_and_the_bundle_knows_both(
    checkpoint: dict[str, Tensor], tmp_path: Path
) -> None:
    section = saved(tmp_path / "a.safetensors", checkpoint, {"modelspec.prediction_type": "v"})
    bundle = skeleton(section.model_copy(update={"prediction_type": "epsilon"}))
    assert bundle.prediction_type == "epsilon"
    assert bundle.scheduler_config["prediction_type"] == "v_prediction"


def test_a_pickled_file_is_asked_about_too(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": checkpoint}, tmp_path / "v2-1_768.ckpt")
    told = asked(ModelSection(base=str(tmp_path / "v2-1_768.ckpt")))
    assert "  v_prediction: the file's name has '768'" in told


def test_only_the_text_to_image_models_of_sd2_are_open() -> None:
    """SD 1.x and both inpainting models predict the noise."""
    text = {1: "cond_stage_model.transformer.text_model.x", 2: "cond_stage_model.model.x"}
    found = {
        (size.version, inputs): is_open({**unet_shapes(size._replace(in_channels=inputs)), text[size.version]: ()}, {})
        for size in (SD15, SD21)
        for inputs in (4, 9)
    }
    assert found == {(1, 4): False, (1, 9): False, (2, 4): True, (2, 9): False}


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.fixture
def recipe(checkpoint: dict[str, Tensor], tmp_path: Path) -> Path:
    saved(tmp_path / "v2-1_768.safetensors", checkpoint)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a picture")
    sections = {"model": {"base": str(tmp_path / "v2-1_768.safetensors")}, "targets": {"preset": "attention"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections | {"data": {"sources": [{"path": str(tmp_path)}]}}))
    return tmp_path / "recipe.yaml"


def test_a_plan_asks_before_anything_is_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("plan", recipe, "--json") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "set model.prediction_type" in captured.err
    assert "v_prediction: the file's name has '768'" in captured.err
    assert "Traceback" not in captured.err


def test_an_answered_plan_needs_no_network_built_and_checks_the_objective(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(section: Any) -> None:
        raise AssertionError("the plan was not made from the header alone")

    monkeypatch.setattr(outline, "_built", refuse)
    zero = "objective.zero_terminal_snr=true"
    assert status("plan", recipe, "model.prediction_type=v_prediction", zero, "--json") == 0
    assert status("plan", recipe, "model.prediction_type=epsilon", zero, "--json") == 2
    assert "zero_terminal_snr" in capsys.readouterr().err
