"""`data.captions` in a recipe: what is taken, what is refused, where a source's own stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_kit.errors import RecipeError
from lora_kit.recipe import CaptionRules, CaptionSection, Recipe, dump_recipe, load_recipe


def load(folder: Path, captions: str, source: str = "") -> Recipe:
    path = folder / "r.yaml"
    path.write_text(f"data:\n  sources: [{{path: .{source}}}]\n  captions: {captions}\noutput_dir: /runs/x\n")
    return load_recipe(path)


def refused(folder: Path, captions: str, source: str = "") -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, captions, source)
    return str(caught.value)


def test_without_the_section_captions_stay_as_they_are() -> None:
    recipe = Recipe.model_validate({"data": {"sources": [{"path": "/pictures"}]}})
    assert recipe.data.captions == CaptionSection()
    assert recipe.data.sources[0].captions is None


def test_a_sources_own_section_is_read(tmp_path: Path) -> None:
    recipe = load(tmp_path, "{shuffle: true, long: chunks}", ", captions: {keep_tags: 2}")
    assert recipe.data.sources[0].captions == CaptionRules(keep_tags=2)
    assert recipe.data.captions == CaptionSection(shuffle=True, long="chunks")


def test_what_is_done_to_long_captions_is_the_whole_data_sets(tmp_path: Path) -> None:
    assert "data.sources.0.captions.long: unknown key." in refused(tmp_path, "{}", ", captions: {long: chunks}")


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        (r'{replace: {"re:(": x}}', "data.captions.replace: `re:(` is not a regular expression: "),
        (r'{replace: {"re:a": "\\1"}}', r"data.captions.replace: `\1` cannot replace `re:a`: invalid group reference"),
        (r'{replace: {"re:a": "\\g<b>"}}', r"data.captions.replace: `\g<b>` cannot replace `re:a`: unknown group name"),
        (r'{replace: {"": x}}', "data.captions.replace: `` finds nothing; name the text to replace."),
        (r'{replace: {"re:": x}}', "data.captions.replace: `re:` finds nothing; name the text to replace."),
        ("{keep_separator: ','}", "data.captions.keep_separator: is `,`, the same as `separator`;"),
        ("{keep_separator: '  '}", "data.captions.keep_separator: is only spaces;"),
        ("{separator: ''}", 'data.captions.separator: got ""; must not be empty.'),
        ("{tag_dropout: 1.5}", "data.captions.tag_dropout: got 1.5; must be at most 1."),
        ("{shufle: true}", "data.captions.shufle: unknown key. Did you mean shuffle"),
        ("{long: chunk}", 'data.captions.long: got "chunk"; allowed: cut, chunks. Did you mean chunks'),
    ],
)
def test_each_mistake_is_refused_when_the_recipe_is_read(tmp_path: Path, captions: str, said: str) -> None:
    text = refused(tmp_path, captions)
    assert said in text
    assert text.startswith("1 error in ")


def test_rules_survive_being_written_and_read_again(tmp_path: Path) -> None:
    rules = r'{replace: {"a.b": "$c {d|e}", "re:\\b(\\d+)girl": "\\1 woman"}, prefix: "#1: {x|y}", separator: ";"}'
    recipe = load(tmp_path, rules)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe
    assert list(recipe.data.captions.replace) == ["a.b", r"re:\b(\d+)girl"]
