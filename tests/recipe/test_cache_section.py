"""Where `cache: disk` keeps things."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_kit.recipe import DataSection, Recipe, dump_recipe, load_recipe
from lora_kit.recipe.cache import cache_folder

SOURCES = [{"path": "/pictures"}]


def section(**fields: object) -> DataSection:
    return DataSection.model_validate({"sources": SOURCES, **fields})


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_KIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_older_recipes_keep_their_meaning() -> None:
    assert section().cache == "memory"
    assert [section(cache=cache).cache for cache in ("memory", "none")] == ["memory", "none"]


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(section()) == tmp_path / ".cache" / "lora_kit"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder(section()) == tmp_path / ".cache" / "lora_kit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(section()) == tmp_path / "xdg" / "lora_kit"
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "own"))
    assert cache_folder(section()) == tmp_path / "own"
    assert cache_folder(section(cache_dir=str(tmp_path / "named"))) == tmp_path / "named"


def write_recipe(folder: Path, cache_dir: str) -> Path:
    (folder / "pictures").mkdir()
    path = folder / "recipe.yaml"
    path.write_text(f"data: {{sources: [{{path: pictures}}], cache: disk, cache_dir: {cache_dir}}}\n")
    return path


def test_a_relative_folder_lies_beside_the_recipe_and_need_not_exist(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, "latents"))
    assert cache_folder(recipe.data) == tmp_path / "latents"
    path = tmp_path / "again.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_an_overridden_folder_lies_in_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path, "latents")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe: Recipe = load_recipe(path, ["data.cache_dir=mine"])
    assert cache_folder(recipe.data) == tmp_path / "here" / "mine"
