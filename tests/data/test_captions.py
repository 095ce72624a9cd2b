"""Captions of records: tags, wildcards, several captions, replacements; pure in (seed, epoch, sample)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lora_kit.data import Record, TrainingSet, open_training_set
from lora_kit.data.captions import CaptionChances, Captioner, caption_of, longest_captions, possible_captions
from lora_kit.data.records import fingerprint
from lora_kit.data.wildcards import all_expansions, expand, is_balanced
from lora_kit.recipe import CaptionRules, DataSection

TAGS = "a, b, c, d, e"
MANY = 400


def drawn(caption: str | list[str], count: int = MANY, **fields: object) -> Counter[str]:
    """Captions of `count` samples."""
    captions, rules = [caption] if isinstance(caption, str) else caption, CaptionRules.model_validate(fields)
    return Counter(caption_of(captions, rules, CaptionChances(0, 0, sample)) for sample in range(count))


def plain(caption: str | list[str], **fields: object) -> str:
    return caption_of([caption] if isinstance(caption, str) else caption, CaptionRules.model_validate(fields))


def is_about(found: int, chance: float, count: int = MANY) -> bool:
    """Within 5 standard deviations of a binomial."""
    return abs(found - count * chance) < 5 * math.sqrt(count * chance * (1 - chance))


# Nothing asked


@given(st.text(), st.integers(0, 2**32))
def test_without_rules_a_caption_is_what_the_source_gave(text: str, sample: int) -> None:
    assert caption_of([text], CaptionRules(), CaptionChances(0, 0, sample)) == text
    assert possible_captions([text], CaptionRules(), 1) == [text]


# Tags


def test_shuffling_gives_every_order_equally_often() -> None:
    found = drawn("a, b, c", 600, shuffle=True)
    assert set(found) == {", ".join(order) for order in permutations("abc")}
    assert all(is_about(times, 1 / 6, 600) for times in found.values())


def test_the_first_k_tags_stay() -> None:
    found = drawn(TAGS, shuffle=True, tag_dropout=0.5, keep_tags=2)
    assert all(caption.startswith("a, b") for caption in found)
    assert found.keys() >= {"a, b", "a, b, e, d", "a, b, c, d, e"}


def test_tags_before_the_mark_stay_instead_of_the_first_k() -> None:
    rules: dict[str, Any] = {"shuffle": True, "tag_dropout": 0.5, "keep_tags": 4, "keep_separator": "|||"}
    found = drawn("a, b ||| c, d ||| y, z", **rules)
    assert set(found) == {f"a, b{middle}, y, z" for middle in ("", ", c", ", d", ", c, d", ", d, c")}
    assert plain("a, b, c, d, e", **rules) == TAGS


def test_the_mark_is_taken_out_where_nothing_is_random() -> None:
    assert plain("a,b|||c|||d", keep_separator="|||") == TAGS[:10]


def test_each_tag_is_dropped_with_the_asked_chance_by_itself() -> None:
    found = drawn("a, b", tag_dropout=0.3)
    both = {"": 0.09, "a": 0.21, "b": 0.21, "a, b": 0.49}
    assert found.keys() == both.keys()
    assert all(is_about(found[caption], chance) for caption, chance in both.items())


def test_a_chance_of_one_leaves_the_kept_tags() -> None:
    assert drawn(TAGS, tag_dropout=1.0, keep_tags=1) == {"a": MANY}


def test_tags_may_have_another_separator() -> None:
    assert set(drawn("a, b; c", shuffle=True, separator=";")) == {"a, b; c", "c; a, b"}
    assert set(drawn("a b", shuffle=True, separator=" ")) == {"a b", "b a"}


def test_dropping_moves_no_shuffled_tag() -> None:
    for sample in range(50):
        chances = CaptionChances(0, 3, sample)
        order = caption_of([TAGS], CaptionRules(shuffle=True), chances).split(", ")
        left = caption_of([TAGS], CaptionRules(shuffle=True, tag_dropout=0.4), chances).split(", ")
        assert left == [tag for tag in order if tag in left] or left == [""]


# Several captions


def test_one_of_several_captions_is_drawn_evenly() -> None:
    found = drawn(["x", "y", "z"], 600)
    assert found.keys() == {"x", "y", "z"}
    assert all(is_about(times, 1 / 3, 600) for times in found.values())


def test_several_captions_may_be_joined_or_the_first_taken() -> None:
    assert drawn(["x", "y, z"], choose="join") == {"x, y, z": MANY}
    assert drawn(["x", "y, z"], choose="first") == {"x": MANY}


def test_lines_are_captions_only_where_asked() -> None:
    text = "one\n\n  two \nthree"
    assert set(drawn(text, lines=True)) == {"one", "two", "three"}
    assert drawn(text) == {text: MANY}


# Wildcards


def test_wildcards_nest() -> None:
    found = drawn("a {red|{dark|pale} blue} cat", 800, wildcards=True)
    assert found.keys() == {"a red cat", "a dark blue cat", "a pale blue cat"}
    assert is_about(found["a red cat"], 1 / 2, 800)
    assert is_about(found["a dark blue cat"], 1 / 4, 800)


def test_braces_are_text_unless_asked() -> None:
    assert drawn(r"{a|b} \{c\}") == {r"{a|b} \{c\}": MANY}


def test_a_backslash_keeps_braces_bars_and_itself() -> None:
    assert drawn(r"\{a\|b\} | \\ \( {x\|y}", wildcards=True) == {"{a|b} | \\ \\( x|y": MANY}


def test_wildcards_of_one_caption_are_drawn_by_themselves() -> None:
    found = drawn("{a|b}{c|d}", wildcards=True)
    assert all(is_about(found[text], 1 / 4) for text in ("ac", "ad", "bc", "bd"))


def test_a_choice_may_hold_tags() -> None:
    assert set(drawn("{a, b|c}, d", wildcards=True, shuffle=True, keep_tags=1)) == {"a, b, d", "a, d, b", "c, d"}


def test_without_chance_the_first_choice_is_taken() -> None:
    assert plain("{{x|y} z|w}, {|v}", wildcards=True) == "x z, "


def plain_language() -> st.SearchStrategy[str]:
    return st.recursive(
        st.text("ab ", max_size=3),
        lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda parts: "{" + "|".join(parts) + "}"),
        max_leaves=6,
    )


def meaning(text: str) -> set[str]:
    """What a balanced text without escapes can become, by substituting innermost wildcards one by one."""
    close = text.find("}")
    if close < 0:
        return {text}
    start = text.rindex("{", 0, close)
    choices = text[start + 1 : close].split("|")
    return {end for choice in choices for end in meaning(text[:start] + choice + text[close + 1 :])}


@given(st.lists(plain_language(), max_size=3).map("".join))
def test_all_expansions_are_those_of_substituting_by_hand(text: str) -> None:
    assert is_balanced(text)
    found = all_expansions(text, 3**18)
    assert found is not None
    assert set(found) == meaning(text)


@given(st.text("{|}\\a"))
def test_any_text_is_expanded(text: str) -> None:
    assert isinstance(expand(text, lambda _, choices: choices[-1]), str)


def test_a_thousand_braces_are_no_trouble() -> None:
    assert expand("{" * 5000 + "a" + "}" * 5000, lambda _, choices: choices[0]) == "a"
    assert all_expansions("{a|b}" * 1000, 100) is None


@pytest.mark.parametrize("text", ["a {b|c", "a b|c}", "{a|{b}"])
def test_a_brace_without_its_half_stays_and_is_told(text: str, folder: Path) -> None:
    assert plain(text, wildcards=True) in (text, "{a|b")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": text}))
    said = f"1 captions have a brace without its other half, taken as written: {folder.name}/0.png."
    assert said in training_set(folder, {"wildcards": True}).notices
    assert not any("other half" in notice for notice in training_set(folder, {}).notices)


# Words


def test_literal_replacements_follow_one_another() -> None:
    assert plain("1girl, a.b", replace={"1girl": "woman", "woman": "lady", ".": "-"}) == "lady, a-b"


def test_patterns_replace_with_their_groups() -> None:
    assert plain("2girls, 3boys", replace={r"re:(\d)(girl|boy)s": r"\1 \2 people"}) == "2 girl people, 3 boy people"


def test_a_replacement_may_hold_a_wildcard() -> None:
    assert set(drawn("a cat", replace={"cat": "{cat|kitten}"}, wildcards=True)) == {"a cat", "a kitten"}


def test_underscores_become_spaces_except_in_smileys() -> None:
    text = "long_hair,looking_at_viewer, ^_^, o_o, >_<, 0_0, a_(b_c_dd)"
    wanted = "long hair,looking at viewer, ^_^, o_o, >_<, 0_0, a (b c dd)"
    assert plain(text, underscores_to_spaces=True) == wanted


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [("cat", "photo of cat in oil"), ("", "photo of in oil"), ("a\nb", "photo of a\nb in oil")],
)
def test_prefix_and_suffix_stand_a_space_apart(caption: str, wanted: str) -> None:
    assert plain(caption, prefix="photo of ", suffix="in oil") == wanted


def test_a_suffix_of_tags_stands_close() -> None:
    assert plain("cat", suffix=", oil") == "cat, oil"
    assert plain("", suffix="oil") == "oil"


def test_prefix_and_suffix_are_never_shuffled_but_may_hold_wildcards() -> None:
    found = drawn("a, b", prefix="{x|y},", suffix=", z", shuffle=True, wildcards=True)
    assert set(found) == {f"{first}, {tags}, z" for first in "xy" for tags in ("a, b", "b, a")}


# Foretelling


def test_possible_captions_are_those_that_are_drawn() -> None:
    captions, fields = ["{a|b} {c|d|c}", "e"], {"wildcards": True, "prefix": "{|p}"}
    possible = possible_captions(captions, CaptionRules.model_validate(fields), 20)
    assert possible is not None
    assert set(possible) == set(drawn(captions, 2000, **fields))
    assert possible[0] == plain(captions, **fields)
    assert possible_captions(captions, CaptionRules.model_validate(fields), 5) is None


@pytest.mark.parametrize("fields", [{"shuffle": True}, {"tag_dropout": 0.1}])
def test_captions_whose_tags_vary_cannot_be_listed(fields: dict[str, object]) -> None:
    rules = CaptionRules.model_validate(fields)
    assert possible_captions(["a, b"], rules, 1000) is None
    assert possible_captions(["a, b"], rules.model_copy(update={"keep_tags": 2}), 1) == ["a, b"]


def test_a_single_tag_has_one_order() -> None:
    assert possible_captions(["a"], CaptionRules(shuffle=True), 1) == ["a"]


def test_the_longest_form_has_all_captions_tags_and_the_longest_choices() -> None:
    rules = CaptionRules(wildcards=True, shuffle=True, tag_dropout=0.9, suffix="{x|xx}")
    assert longest_captions(["{a|aaa}, b", "c"], rules) == ["aaa, b xx", "c xx"]


# In the stream


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures with tags."""
    for index in range(3):
        Image.new("RGB", (8, 8), (80 * index, 0, 0)).save(tmp_path / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "text": f"n{index}, a, b, c, d"} for index in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def training_set(folder: Path, captions: dict[str, object], **data: object) -> TrainingSet:
    whole = {"sources": [{"path": str(folder), "repeats": 2}], "resolution": 8, "captions": captions, **data}
    return open_training_set(DataSection.model_validate(whole), seed=7)


RANDOM: dict[str, object] = {"shuffle": True, "tag_dropout": 0.2, "keep_tags": 1, "prefix": "{x|y}", "wildcards": True}


def test_captions_do_not_depend_on_what_was_asked_before(folder: Path) -> None:
    forward, backward = training_set(folder, RANDOM), training_set(folder, RANDOM, batch_size=1)
    captions = [forward[position].caption for position in range(30)]
    assert [backward[position].caption for position in reversed(range(30))] == captions[::-1]


def test_epochs_and_repeats_draw_anew(folder: Path) -> None:
    samples = training_set(folder, {"shuffle": True})
    found = {samples[position].caption for position in range(10 * len(samples)) if "0.png" in samples[position].id}
    assert len(found) > 15  # 20 draws of 120 orders: the odds of five or more repeats among them are below 1e-2, once


def test_rules_move_no_flip_and_no_caption_dropout(folder: Path) -> None:
    fields: dict[str, object] = {"flip": True, "crop": "random", "caption_dropout": 0.5}
    ruled, bare = training_set(folder, RANDOM, **fields), training_set(folder, {}, **fields)
    for position in range(24):
        assert ruled[position].id == bare[position].id
        assert (ruled[position].caption == "") == (bare[position].caption == "")


def test_held_out_captions_have_nothing_random(folder: Path) -> None:
    samples = training_set(folder, RANDOM, trigger="zwx")
    assert samples.plain(1).caption == "zwx x n1, a, b, c, d"
    assert samples.captions()[1] == "zwx x n1, a, b, c, d"
    assert samples.possible_captions(1, 1000) is None


def test_a_sources_rules_replace_the_data_sets(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    Image.new("RGB", (8, 8)).save(other / "p.png")
    (other / "p.txt").write_text("q")
    sources = [{"path": str(folder)}, {"path": str(other), "captions": {"suffix": "s", "trigger": False}}]
    samples = training_set(folder, {"prefix": "p"}, sources=sources, trigger="zwx")
    assert samples.captions()[2:] == ["zwx p n2, a, b, c, d", "q s"]


def record(captions: tuple[str, ...], is_regularisation: bool = False) -> Record:
    return Record("r", captions[0], 0, 1, Image.Image, captions, is_regularisation)


def captioner(**captions: object) -> Callable[..., str]:
    section = {"sources": [{"path": "/p"}], "trigger": "zwx", "captions": captions}
    return Captioner(DataSection.model_validate(section)).caption


def test_regularisation_pictures_are_not_told_the_trigger_unless_asked() -> None:
    one = record(("a dog",), is_regularisation=True)
    assert captioner()(one) == "a dog"
    assert captioner(trigger=True)(one) == "zwx a dog"


def test_several_captions_of_a_record_count() -> None:
    assert captioner()(record(("a", "b"))) == "zwx a"
    found = {captioner()(record(("a", "b")), CaptionChances(0, epoch, 0)) for epoch in range(20)}
    assert found == {"zwx a", "zwx b"}
    assert len({fingerprint([record(captions)]) for captions in (("a",), ("a", "b"), ("a", "c"))}) == 3


def test_these_very_draws_make_resumed_runs_the_same() -> None:
    rules = CaptionRules(shuffle=True, tag_dropout=0.2, wildcards=True)
    got = [caption_of(["{u|v|w}, a, b", "c, d"], rules, CaptionChances(1, 2, sample)) for sample in range(8)]
    assert got == ["d, c", "c", "d, c", "c, d", "c, d", "c, d", "c", "u, b"]
