"""`objective:` in a recipe: what goes together, what is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_kit.errors import RecipeError
from lora_kit.recipe import ObjectiveSection, Recipe, TimestepSection, dump_recipe, load_recipe, recipe_schema
from lora_kit.recipe.objective import check_against_base, weight_name


def load(folder: Path, objective: str, *overrides: str) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(f"data: {{sources: [{{path: .}}]}}\nobjective: {objective}\noutput_dir: /runs/x\n")
    return load_recipe(path, overrides)


def refused(folder: Path, objective: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(folder, objective, *overrides)
    return str(caught.value).splitlines()[1:]


def test_without_the_section_it_is_the_plain_squared_error(tmp_path: Path) -> None:
    objective = load(tmp_path, "{}").objective
    assert objective == ObjectiveSection()
    assert (objective.loss, weight_name(objective), objective.timesteps) == ("l2", None, TimestepSection())


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("{huber_c: 0.2}", "objective.huber_c: `huber_c: 0.2` does nothing with `loss: l2`"),
        ("{loss: l1, huber_schedule: constant}", "objective.huber_schedule: `huber_schedule: constant` does nothing"),
        ("{loss: huber, huber_c: 0.0}", "objective.huber_c: got 0.0; must be above 0."),
        ("{min_snr_gamma: 5.0, debiased: true}", "objective.debiased: beside `min_snr_gamma`: each is a weight"),
        ("{soft_min_snr_gamma: 4.0, p2_gamma: 1.0}", "objective.p2_gamma: beside `soft_min_snr_gamma`"),
        ("{min_snr_gamma: 5.0, v_as_epsilon: true}", "v_as_epsilon: beside `min_snr_gamma`, which is stated for v"),
        ("{p2_k: 2.0}", "objective.p2_k: `p2_k: 2.0` does nothing without `p2_gamma`"),
        (
            "{pyramid_levels: 6, noise_offset: 0.1}",
            "objective.noise_offset: `noise_offset: 0.1` beside `pyramid_levels`",
        ),
        ("{pyramid_discount: 0.8}", "objective.pyramid_discount: `pyramid_discount: 0.8` does nothing without"),
        (
            "{adaptive_noise_scale: -0.1}",
            "objective.adaptive_noise_scale: got -0.1, which lessens a `noise_offset` of 0",
        ),
        ("{timesteps: {min: 5, max: 4}}", "objective.timesteps.max: got 4, below `min` = 5"),
        (
            "{timesteps: {logit_mean: 1.0}}",
            "timesteps.logit_mean: `logit_mean: 1.0` does nothing with `distribution: uni",
        ),
        ("{timesteps: {distribution: mode, bias_factor: 3.0}}", "bias_factor: `bias_factor: 3.0` does nothing"),
        ("{timesteps: {distribution: band}}", "objective.timesteps.bias_band: needed with `distribution: band`"),
        (
            "{timesteps: {distribution: band, bias_band: [9, 3]}}",
            "bias_band: got [9, 3]; must be two timesteps in order",
        ),
        ("{timesteps: {distribution: band, bias_band: [9, 30], max: 20}}", "from `min` = 0 to `max` = 20"),
        (
            "{timesteps: {distribution: mode, mode_scale: 2.0}}",
            "objective.timesteps.mode_scale: got 2.0; must be at most",
        ),
        ("{timesteps: {distribution: logitnormal}}", "Did you mean logit_normal"),
        ("{loss: mse}", 'objective.loss: got "mse"; allowed: l2, l1, huber, smooth_l1'),
        ("{min_snr: 5}", "objective.min_snr: unknown key. Did you mean min_snr_gamma"),
    ],
)
def test_each_mistake_is_refused_when_the_recipe_is_read(tmp_path: Path, objective: str, said: str) -> None:
    lines = refused(tmp_path, objective)
    assert len(lines) == 1
    assert said in lines[0]


def test_everything_wrong_in_a_section_is_listed_at_once(tmp_path: Path) -> None:
    objective = "{huber_c: 0.2, min_snr_gamma: 5.0, debiased: true, timesteps: {min: 5, max: 4}}"
    # A section is checked once its own parts are right: first the timesteps, then the rest.
    assert [line.split(":")[0].strip() for line in refused(tmp_path, objective)] == ["objective.timesteps.max"]
    objective = "{huber_c: 0.2, min_snr_gamma: 5.0, debiased: true}"
    assert len(refused(tmp_path, objective)) == 2


@pytest.mark.parametrize("predicts", ["epsilon", "sample"])
def test_what_needs_a_prediction_of_v_is_refused_of_others(tmp_path: Path, predicts: str) -> None:
    (line,) = refused(tmp_path, "{v_as_epsilon: true}", f"model.prediction_type={predicts}")
    assert f"objective.v_as_epsilon: `true` is for networks that predict v; this one predicts {predicts}" in line


@pytest.mark.parametrize("predicts", ["v_prediction", "sample"])
def test_zero_terminal_snr_goes_with_v_and_the_clean_latents(tmp_path: Path, predicts: str) -> None:
    assert load(tmp_path, "{zero_terminal_snr: true}", f"model.prediction_type={predicts}").objective.zero_terminal_snr
    (line,) = refused(tmp_path, "{zero_terminal_snr: true}", "model.prediction_type=epsilon")
    assert "objective.zero_terminal_snr: `true` with a network that predicts the noise" in line


def test_the_base_decides_where_the_recipe_does_not_say() -> None:
    section = ObjectiveSection(zero_terminal_snr=True, timesteps=TimestepSection(max=999))
    check_against_base(section, "base", "v_prediction", 1000)
    with pytest.raises(
        RecipeError, match=r"does not fit base, which predicts epsilon:\n  objective\.zero_terminal_snr"
    ):
        check_against_base(section, "base", "epsilon", 1000)
    with pytest.raises(RecipeError, match=r"objective\.timesteps\.max: got 999, .* timesteps 0 … 499"):
        check_against_base(section, "base", "v_prediction", 500)


def test_a_section_survives_being_written_and_read_again(tmp_path: Path) -> None:
    objective = "{loss: huber, timesteps: {distribution: band, bias_band: [200, 500], stratified: true}}"
    recipe = load(tmp_path, objective)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe
    assert recipe.objective.timesteps.bias_band == (200, 500)


def test_every_field_has_a_description_in_the_schema() -> None:
    definitions: dict[str, Any] = recipe_schema()["$defs"]
    for name in ("ObjectiveSection", "TimestepSection"):
        assert [key for key, field in definitions[name]["properties"].items() if not field.get("description")] == []
