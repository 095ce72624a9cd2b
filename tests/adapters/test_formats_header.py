from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lora_kit.adapters import CaptionFacts, TrainingFacts, family_of, public_recipe, training_metadata
from lora_kit.recipe import DataSection, Recipe, SourceSection, ValidationSection

FACTS = TrainingFacts(
    family="sd2",
    prediction_type="v_prediction",
    recipe="seed: 0\n",
    plan="{}",
    base_hash="abc",
    base_name="base",
    output_name="style",
    learning_rate=1e-4,
    rank=16,
    alpha=8.0,
    resolution=768,
    train_images=48,
    epoch=3,
    step=400,
    max_steps=400,
    seed=7,
    trigger="sks",
    captions=CaptionFacts(tag_frequency={"cats": {"a cat": 2}}, dataset_dirs={"cats": {"img_count": 2}}),
)


def test_the_header_says_what_other_readers_look_for() -> None:
    header = training_metadata(FACTS)
    assert header["ss_base_model_version"] == "sd_v2_v"
    assert header["ss_v2"] == "True"
    assert header["ss_network_dim"] == "16"
    assert header["ss_tag_frequency"] == '{"cats": {"a cat": 2}}'
    assert header["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert header["modelspec.prediction_type"] == "v"
    assert header["modelspec.trigger_phrase"] == "sks"
    assert header["lora_kit.recipe"] == "seed: 0\n"
    assert all(isinstance(value, str) for value in header.values())


def test_no_time_and_no_captions_unless_given() -> None:
    header = training_metadata(replace(FACTS, captions=None))
    assert "modelspec.date" not in header
    assert not [key for key, value in header.items() if "cat" in value]


@pytest.mark.parametrize("names", [True, False])
def test_a_shared_recipe_holds_no_path_of_the_machine(names: bool, tmp_path: Path) -> None:
    source = SourceSection(path=str(tmp_path / "secret_folder"), metadata_file=str(tmp_path / "secret_folder.json"))
    recipe = Recipe(
        data=DataSection(sources=[source]),
        validation=ValidationSection(held_out=SourceSection(path=str(tmp_path / "secret_folder_2"))),
        output_dir=str(tmp_path / "runs" / "one"),
    )
    text = public_recipe(recipe, folder_names=names)
    assert str(tmp_path) not in text
    assert ("secret_folder" in text) is names
    assert yaml.safe_load(text)["output_dir"] == "one"


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"lora_kit.family": "sd1"}, "sd1"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd1"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl_base_v1-0"),
        ({}, None),
    ],
)
def test_the_family_is_told_from_the_header(metadata: dict[str, str], family: str | None) -> None:
    assert family_of(metadata) == family
