from __future__ import annotations

from pathlib import Path

import pytest

from lora_kit.errors import RecipeError
from lora_kit.recipe import Recipe, describe_lookup, load_recipe


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """recipes/ with a picture folder and a checkpoint; the current folder is its sibling work/, with its own."""
    for folder in ("recipes/data/cats", "recipes/sd15", "work/data/dogs", "work/sd21"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "recipes/old.safetensors").touch()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def load(here: Path, text: str = "", *overrides: str, source: str = "data/cats") -> Recipe:
    path = here / "recipes/r.yaml"
    path.write_text(f"data: {{sources: [{{path: '{source}'}}]}}\n{text}", encoding="utf-8")
    return load_recipe(path, overrides)


def message(here: Path, text: str = "", *overrides: str, source: str = "data/cats") -> str:
    with pytest.raises(RecipeError) as caught:
        load(here, text, *overrides, source=source)
    return str(caught.value)


def test_paths_of_the_recipe_are_relative_to_its_folder(here: Path) -> None:
    text = "model: {base: sd15, tokenizer: ./sd15}\noutput_dir: runs/x\ntrain: {resume: runs/x/checkpoints/a}"
    recipe = load(here, text)
    assert recipe.data.sources[0].path == str(here / "recipes/data/cats")
    assert recipe.model.base == recipe.model.tokenizer == str(here / "recipes/sd15")
    assert recipe.output_dir == str(here / "recipes/runs/x")
    assert recipe.train.resume == str(here / "recipes/runs/x/checkpoints/a")


def test_paths_of_overrides_are_relative_to_the_current_folder(here: Path) -> None:
    recipe = load(here, "", "model.base=sd21", "output_dir=out", "data.sources.0.path=data/dogs")
    assert recipe.data.sources[0].path == str(here / "work/data/dogs")
    assert recipe.model.base == str(here / "work/sd21")
    assert recipe.output_dir == str(here / "work/out")


def test_a_whole_section_set_by_an_override_is_relative_to_the_current_folder(here: Path) -> None:
    recipe = load(here, "", "data={sources: [{path: data/dogs}]}")
    assert recipe.data.sources[0].path == str(here / "work/data/dogs")


def test_the_default_output_folder_lies_beside_the_recipe(here: Path) -> None:
    assert load(here).output_dir == str(here / "recipes/runs/default")


def test_held_out_pictures_are_resolved_too(here: Path) -> None:
    recipe = load(here, "", "validation.held_out.path=data/dogs")
    assert recipe.validation.held_out is not None
    assert recipe.validation.held_out.path == str(here / "work/data/dogs")


def test_a_recipe_named_from_its_own_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(here)
    monkeypatch.chdir(here / "recipes")
    assert load_recipe("r.yaml").data.sources[0].path == str(here / "recipes/data/cats")


def test_parents_are_followed(here: Path) -> None:
    assert load(here, "output_dir: ../runs").output_dir == str((here / "runs").resolve())


def test_variables_and_home_are_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICTURES", str(here / "work/data"))
    monkeypatch.setenv("KIND", "dogs")
    monkeypatch.setenv("HOME", str(here / "home"))
    recipe = load(here, "output_dir: ~/runs/a$$b", source="${PICTURES}/$KIND")
    assert recipe.data.sources[0].path == str(here / "work/data/dogs")
    assert recipe.output_dir == str(here / "home/runs/a$b")


def test_only_paths_are_expanded(here: Path) -> None:
    assert load(here, "validation: {prompts: [$HOME ~]}").validation.prompts == ["$HOME ~"]


def test_an_undefined_variable_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    said = message(here, source="${NOT_SET}/x")
    assert 'data.sources.0.path: got "${NOT_SET}/x", but the environment variable NOT_SET is not set' in said


def test_an_unknown_user_is_named(here: Path) -> None:
    assert 'output_dir: got "~no-such-user/x", but there is no such user' in message(
        here, "output_dir: ~no-such-user/x"
    )


@pytest.mark.parametrize("base", ["tiny", "org/name", "stabilityai/stable-diffusion-2-1"])
def test_the_packaged_base_and_hub_ids_stay(here: Path, base: str) -> None:
    assert load(here, f"model: {{base: {base}}}").model.base == base


@pytest.mark.parametrize("source", ["org/name", "mnist"])
def test_data_set_ids_stay(here: Path, source: str) -> None:
    assert load(here, source=source).data.sources[0].path == source


def test_latest_stays(here: Path) -> None:
    assert load(here, "train: {resume: latest}").train.resume == "latest"


@pytest.mark.parametrize(
    "base", ["./sd", "../sd", "/sd", "old.ckpt", "org/name.safetensors", "sd", "a/b/c", "data/sd", "~/sd"]
)
def test_a_missing_base_says_where_it_was_looked_for(here: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    said = message(here, f"model: {{base: {base}}}")
    whole = (here / "recipes" / base.replace("~", str(here / "home"))).resolve()
    assert f"looked for {whole}" in said
    if not base.startswith(("/", "~")):
        assert f"(relative to the recipe's folder {here / 'recipes'})" in said


def test_a_missing_base_of_an_override_was_looked_for_in_the_current_folder(here: Path) -> None:
    said = message(here, "", "model.base=./sd15")
    assert f"looked for {here / 'work/sd15'} (relative to the current folder, as it is an override)" in said
    assert "Did you mean sd21?" in said


def test_a_name_that_is_no_hub_id_says_so(here: Path) -> None:
    assert "and it cannot be a model's hub id (`org/name`)" in message(here, "model: {base: sdxl-base}")


def test_a_slip_beside_an_existing_folder_is_no_hub_id(here: Path) -> None:
    said = message(here, source="data/catz")
    assert f"there is no such file or folder: looked for {here / 'recipes/data/catz'} (relative to" in said
    assert "Did you mean cats?" in said


def test_describe_lookup() -> None:
    assert describe_lookup("a/b", Path("/r")) == "looked for /r/a/b (relative to the recipe's folder)"
    assert describe_lookup("/a/b", Path("/r")) == "looked for /a/b"
