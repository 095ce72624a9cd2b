"""sd-scripts' data-set TOML as sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_kit.errors import RecipeError
from lora_kit.recipe import DataSection, dump_recipe, expand_sources, load_recipe
from lora_kit.recipe.kohya import FOLLOWED
from lora_kit.recipe.kohya_keys import KEYS

EXAMPLE = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

[[datasets]]
resolution = 256
batch_size = 2
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'girl'
  class_tokens = 'hoge girl'
  num_repeats = 10

  [[datasets.subsets]]
  image_dir = 'boy'
  keep_tokens = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  class_tokens = 'human'

[[datasets]]
resolution = [256, 256]
batch_size = 2

  [[datasets.subsets]]
  image_dir = 'fine'
  metadata_file = 'meta.json'
"""


def expand(tmp_path: Path, toml: str, **data: object) -> DataSection:
    (tmp_path / "set.toml").write_text(toml)
    section = DataSection.model_validate({"sources": [{"path": "set.toml"}], **data})
    return expand_sources(section, tmp_path)


def subset(keys: str, top: str = "") -> str:
    return f"{top}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n{keys}\n"


def message(tmp_path: Path, toml: str, **data: object) -> str:
    with pytest.raises(RecipeError) as caught:
        expand(tmp_path, toml, **data)
    return str(caught.value)


def test_each_subset_is_a_source_and_the_innermost_key_counts(tmp_path: Path) -> None:
    data = expand(tmp_path, EXAMPLE)
    girl, boy, reg, fine = data.sources
    assert [source.path for source in data.sources] == [str(tmp_path / name) for name in ("girl", "boy", "reg", "fine")]
    assert (girl.repeats, girl.caption_fallback, girl.caption_suffix) == (10, "hoge girl", ".txt")
    assert (boy.repeats, boy.caption_fallback) == (1, None)
    assert [s.captions and s.captions.keep_tags for s in data.sources] == [2, 3, 2, 1]
    assert [s.captions and s.captions.shuffle for s in data.sources] == [True] * 4
    assert [s.regularisation for s in data.sources] == [False, False, True, False]
    assert fine.metadata_file == str(tmp_path / "meta.json")
    assert reg.captions is not None
    assert not reg.captions.trigger


def test_folders_are_read_as_sd_scripts_does(tmp_path: Path) -> None:
    (source,) = expand(tmp_path, subset("")).sources
    assert (source.layout, source.nested) == ("plain", False)


def test_what_the_recipe_leaves_open_is_filled(tmp_path: Path) -> None:
    data = expand(tmp_path, subset("flip_aug = true\ncaption_dropout_rate = 0.1", "[general]\nbatch_size = 6"))
    assert (data.batch_size, data.flip, data.caption_dropout) == (6, True, 0.1)


def test_what_the_recipe_says_must_agree(tmp_path: Path) -> None:
    assert expand(tmp_path, EXAMPLE, batch_size=2).batch_size == 2
    said = message(tmp_path, EXAMPLE, batch_size=8)
    assert "batch_size means data.batch_size: 2, but the recipe has 8. Change one of them." in said


def test_a_setting_of_the_whole_set_that_differs_between_subsets(tmp_path: Path) -> None:
    toml = subset("flip_aug = true") + "[[datasets.subsets]]\nimage_dir = 'b'\n"
    assert "flip_aug differs between subsets; data.flip is one for all" in message(tmp_path, toml)


@pytest.mark.parametrize(
    ("keys", "rules"),
    [
        ("", {"lines": True, "choose": "first"}),
        ("enable_wildcard = true", {"lines": True, "choose": "random", "wildcards": True}),
        ("keep_tokens_separator = '|||'\nshuffle_caption = true", {"keep_separator": "|||", "shuffle": True}),
        ("caption_tag_dropout_rate = 0.2\ncaption_separator = ';'", {"tag_dropout": 0.2, "separator": ";"}),
        ("caption_prefix = 'art of'\ncaption_suffix = 'in oil'", {"prefix": "art of", "suffix": "in oil"}),
        # sd-scripts shuffles a prefix with the rest, so it has to be there before.
        (r"shuffle_caption = true" + "\n" + r"caption_prefix = 'a\b,'", {"replace": {r"re:\A": r"a\\b, "}}),
    ],
)
def test_caption_keys(tmp_path: Path, keys: str, rules: dict[str, Any]) -> None:
    (source,) = expand(tmp_path, subset(keys)).sources
    assert source.captions is not None
    assert {name: getattr(source.captions, name) for name in rules} == rules


def test_the_recipes_own_caption_rules_stay_where_the_toml_says_nothing(tmp_path: Path) -> None:
    rules = {"underscores_to_spaces": True, "keep_tags": 5}
    (source,) = expand(tmp_path, subset("keep_tokens = 1"), captions=rules).sources
    assert source.captions is not None
    assert (source.captions.underscores_to_spaces, source.captions.keep_tags) == (True, 1)


def test_alpha_mask(tmp_path: Path) -> None:
    assert expand(tmp_path, subset("alpha_mask = true")).sources[0].alpha == "mask"


UNSUPPORTED = """
color_aug = true
face_crop_aug_range = [1.0, 3.0]
secondary_separator = ';;;'
token_warmup_step = 100
caption_dropout_every_n_epochs = 2
resize_interpolation = 'area'
conditioning_data_dir = 'c'
custom_attributes = {a = 1}
"""


def test_every_key_that_cannot_be_followed_is_named_at_once(tmp_path: Path) -> None:
    top = "[general]\nskip_image_resolution = 512\nnetwork_multiplier = 0.5\nvalidation_split = 0.1"
    said = message(tmp_path, subset(UNSUPPORTED, top))
    keys = [line.partition(" = ")[0] for line in (UNSUPPORTED + top).splitlines() if " = " in line]
    assert len(keys) == 11
    for key in keys:
        assert f"datasets.0.subsets.0.{key}: {key} = " in said


def test_no_key_is_read_and_then_forgotten() -> None:
    assert set(KEYS) == FOLLOWED


def test_values_that_ask_for_nothing_are_no_errors(tmp_path: Path) -> None:
    nothing = "color_aug = false\ntoken_warmup_step = 0\ntoken_warmup_min = 1\ncache_info = true\n"
    assert len(expand(tmp_path, subset(f"{nothing}caption_dropout_every_n_epochs = 0")).sources) == 1


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        (subset("num_repeat = 2"), "datasets.0.subsets.0.num_repeat: unknown key here. Did you mean num_repeats"),
        (subset("batch_size = 2"), "datasets.0.subsets.0.batch_size: unknown key here. It belongs to another place"),
        (subset("", "[general]\nimage_dir = 'a'"), "general.image_dir: unknown key here. It belongs to another place"),
        (subset("num_repeats = 'two'"), 'datasets.0.subsets.0.num_repeats: got "two"; must be a whole number'),
        (subset("num_repeats = 0"), "datasets.0.subsets.0.num_repeats: got 0; must be above 0"),
        ("[[datasets]]\n[[datasets.subsets]]\n", "datasets.0.subsets.0.image_dir: needed, but not given"),
        ("[general]\n", "datasets: needed, but not given"),
        ("[[datasets]]\n", "datasets.0.subsets: needed, but not given"),
        (subset("") + "[[datasets.subsets]]\nimage_dir = 'a'\n", "the same pictures as datasets.0.subsets.0"),
        ("a = ", "cannot be read as a data-set TOML"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, toml: str, said: str) -> None:
    assert said in message(tmp_path, toml)


def test_settings_beside_the_toml_are_refused(tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text(subset(""))
    section = DataSection.model_validate({"sources": [{"path": "set.toml", "repeats": 2}]})
    with pytest.raises(RecipeError, match=r"data\.sources\.0 also sets repeats; the TOML is read as it is"):
        expand_sources(section, tmp_path)


def test_other_sources_stay_and_expanding_twice_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text(subset(""))
    sources = [{"path": "x", "repeats": 3}, {"path": "set.toml"}, {"path": "y"}]
    data = expand_sources(DataSection.model_validate({"sources": sources}), tmp_path)
    assert [source.path for source in data.sources] == ["x", str(tmp_path / "a"), "y"]
    assert data.sources[0].repeats == 3
    assert expand_sources(data, tmp_path) is data


def test_a_loaded_recipe_has_the_subsets_and_reads_back_the_same(tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text(EXAMPLE)
    for name in ("girl", "boy", "reg", "fine"):
        (tmp_path / name).mkdir()
    (tmp_path / "r.yaml").write_text("data: {sources: [{path: set.toml}], trigger: sks}\ntrain: {max_steps: 7}\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["train.max_steps=9"])
    assert (len(recipe.data.sources), recipe.data.resolution, recipe.train.max_steps) == (4, 256, 9)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_checks_between_sections_see_what_the_toml_says(tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text(EXAMPLE)
    (tmp_path / "r.yaml").write_text("data: {sources: [{path: set.toml}]}\ntrain: {micro_batch_size: 4}\n")
    with pytest.raises(RecipeError, match=r"has only `data\.batch_size` = 2 pictures"):
        load_recipe(tmp_path / "r.yaml")


def test_patterns_of_shards_pass_through_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {sources: [{path: 'shards/{000..003}.tar'}]}\n")
    assert load_recipe(tmp_path / "r.yaml").data.sources[0].path == str(tmp_path / "shards/{000..003}.tar")
