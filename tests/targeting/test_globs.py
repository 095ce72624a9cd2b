from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_kit.errors import TargetError
from lora_kit.targeting.globs import compile_pattern, dead_alternatives


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("unet.to_q", "unet.to_q", True),
        ("unet.to_q", "unet.to_q.0", False),
        ("unet.*", "unet.mid", True),
        ("unet.*", "unet.mid.0", False),
        ("unet.*", "unet", False),
        ("unet.attn*", "unet.attn", True),
        ("unet.a*n*1", "unet.attn1", True),
        ("unet.**.to_q", "unet.to_q", True),
        ("unet.**.to_q", "unet.a.b.c.to_q", True),
        ("unet.**.to_q", "unet.a.not_to_q", False),
        ("unet.**", "unet", True),
        ("unet.**", "unet.a.b", True),
        ("unet.**", "unet2.a", False),
        ("**.to_q", "to_q", True),
        ("**", "a.b", True),
        ("u.**.**.x", "u.x", True),
        ("u.to_{q,k,out.0}", "u.to_out.0", True),
        ("u.to_{q,k,out.0}", "u.to_out", False),
        ("u.{a.**,b}.x", "u.a.x", True),
        ("u.{a.**,b}.x", "u.a.c.d.x", True),
        ("u.{**,b}.x", "u.x", True),
        ("u.{a{1,2},b}", "u.a2", True),
        ("u.{a{1,2},b}", "u.a3", False),
        ("u.conv{,_shortcut}", "u.conv", True),
        ("u.a-b_c", "u.a-b_c", True),
        ("u.axb", "u.aXb", False),
        (r"re:unet\..*\.to_[qk]", "unet.a.to_k", True),
        (r"re:unet\..*\.to_[qk]", "unet.a.to_k.b", False),
        ("re:(?i)UNET.*", "unet.a", True),
    ],
)
def test_match(pattern: str, name: str, expected: bool) -> None:
    assert compile_pattern(pattern).matches(name) is expected


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("unet.{a,b", "never closed"),
        ("unet.a}", "outside braces"),
        ("unet.a,b", "outside braces"),
        ("unet..a", "empty name"),
        (".unet", "empty name"),
        ("unet.", "empty name"),
        ("unet.{a,}.b", "empty name"),
        ("unet.a**", "whole names"),
        ("unet.to_?", "is not allowed in a glob"),
        ("unet.to_[qk]", "is not allowed in a glob"),
        ("", "empty name"),
        ("re:(", "not a regular expression"),
        ("{a,b,c,d,e,f,g,h}" * 5, "more than 4096 alternatives"),
    ],
)
def test_unreadable_pattern_says_why(pattern: str, reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        compile_pattern(pattern)


def _independent_match(glob: list[str], names: list[str]) -> bool:
    """Textbook recursion over whole names."""
    if not glob:
        return not names
    if glob[0] == "**":
        return any(_independent_match(glob[1:], names[skipped:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], glob[0]) and _independent_match(glob[1:], names[1:])


@given(
    st.lists(st.sampled_from(["a", "b", "ab", "*", "**", "a*", "*b"]), min_size=1, max_size=5),
    st.lists(st.sampled_from(["a", "b", "ab", "ba", "c"]), min_size=1, max_size=6),
)
def test_glob_agrees_with_recursive_matching(glob: list[str], names: list[str]) -> None:
    assert compile_pattern(".".join(glob)).matches(".".join(names)) is _independent_match(glob, names)


@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "c.d"]), min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=5),
)
def test_braces_are_the_union_of_their_choices(groups: list[list[str]], names: list[str]) -> None:
    texts = [""]
    for group in groups:
        texts = [f"{text}.{item}" for text in texts for item in group]
    pattern = compile_pattern(".".join("{" + ",".join(group) + "}" for group in groups))
    assert pattern.matches(".".join(names)) is (".".join(names) in {text[1:] for text in texts})


def test_dead_alternatives_are_those_no_name_uses() -> None:
    pattern = compile_pattern("u.{a,b{1,2}}.to_{q,x,out.0}")
    assert dead_alternatives(pattern, ["u.a.to_q", "u.b2.to_out.0"]) == ["1", "x"]
