"""Scalars against the tables of the YAML 1.2.2 specification, section 10.3.2; errors against the text itself."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_kit.errors import RecipeError
from lora_kit.recipe.yaml12 import MAX_NODES, Tree, dump, parse

SCALARS = [
    ("1e-4", 1e-4),
    ("1E3", 1000.0),
    ("12.", 12.0),
    (".5", 0.5),
    ("+.5e1", 5.0),
    ("-0.0", -0.0),
    (".inf", math.inf),
    ("-.Inf", -math.inf),
    ("0o17", 15),
    ("0x1F", 31),
    ("010", 10),
    ("-7", -7),
    ("1_000", "1_000"),
    ("1:30", "1:30"),
    ("0b11", "0b11"),
    ("no", "no"),
    ("Yes", "Yes"),
    ("on", "on"),
    ("off", "off"),
    ("y", "y"),
    ("true", True),
    ("FALSE", False),
    ("tRUE", "tRUE"),
    ("~", None),
    ("Null", None),
    ("", None),
    ("2020-01-01", "2020-01-01"),
    ("=", "="),
    ("<<", "<<"),
    ('"1e-4"', "1e-4"),
    ("!!float 3", 3.0),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_the_core_schema(text: str, value: object) -> None:
    got = parse(f"[{text}]" if text else "[~]", "x")
    assert got == [value]
    assert type(got[0]) is type(value)  # type: ignore[index]  # the line above shows it is a list


def test_not_a_number_is_read() -> None:
    value = parse(".NaN", "x")
    assert isinstance(value, float)
    assert math.isnan(value)


def test_an_empty_document_is_none() -> None:
    assert parse("# nothing\n", "x") is None


def test_aliases_are_written_out_unshared() -> None:
    tree = parse("a: &one {x: [1]}\nb: *one", "x")
    assert isinstance(tree, dict)
    assert tree["a"] == tree["b"] == {"x": [1]}
    assert tree["a"] is not tree["b"]


ERRORS = [
    ("a: 1\nb: 2\na: 3", ["r.yaml, line 3, column 1", "`a` is given twice (first on line 1)", "\n    a: 3\n    ^"]),
    ("a:\n  b: 1\n  b: 2", ["line 3, column 3", "`b` is given twice"]),
    ("a: b: c", ["r.yaml, line 1, column 5", "mapping values are not allowed", "\n    a: b: c\n        ^"]),
    ("a: [1,\nb: 2", ["line 2", "while parsing a flow sequence", "expected ',' or ']'"]),
    ("a: 1\n---\nb: 2", ["line 2, column 1", "expected a single document"]),
    ("a: *nothing", ["line 1, column 4", "undefined alias"]),
    ("a: \x00b", ["line 1", "U+0000"]),
    ("1: x", ["line 1, column 1", "a key must be text, got `1`"]),
    ("[a]: x", ["a key must be text, got a list or mapping"]),
    ("a: !!int x", ["line 1, column 4", "not of type int"]),
    ("a: !!python/object:os.system {}", ["could not determine a constructor"]),
    ("a: !!set {x}", ["a set cannot stand in a recipe"]),
    ("a: &x [*x]", ["stands inside the value it refers to"]),
    (f"a: {'9' * 5000}", ["a number of over 100 digits"]),
    ("[" * 5000, ["nested too deeply"]),
]


@pytest.mark.parametrize(("text", "parts"), ERRORS)
def test_errors_say_where_and_what(text: str, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    for part in parts:
        assert part in str(caught.value)


def test_an_error_in_a_long_line_shows_a_window_of_it() -> None:
    with pytest.raises(RecipeError) as caught:
        parse(f"a: '{'x' * 5000}' y", "r.yaml")
    assert max(map(len, str(caught.value).splitlines())) < 200


def test_aliases_cannot_blow_up() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(RecipeError, match=f"more than {MAX_NODES} values"):
        parse("\n".join(lines), "r.yaml")


TREES: st.SearchStrategy[Tree] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.sampled_from([text for text, _ in SCALARS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(TREES)
@example(["\x85", "\u2028a", "\u2029", "\ufeff", "\r", "\r\n", "\n ", "🎨", "- a", "#", "a: b"])
@settings(deadline=None)
def test_what_is_dumped_reads_back_equal(tree: Tree) -> None:
    assert parse(dump(tree), "x") == tree


@pytest.mark.parametrize("text", ["no", "on", "2020-01-01", "1:30", "1e-4", "0o17"])
def test_dumped_text_is_text_to_older_readers_too(text: str) -> None:
    assert yaml.safe_load(dump([text])) == [text]
