"""Patterns over dotted module names: globs with `*`, `**` and `{a,b}`, or `re:` regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from lora_kit.errors import TargetError

MAX_EXPANSIONS = 4096
"""Alternatives multiply; past this many a pattern is a slip of the keyboard."""


class Expansion(NamedTuple):
    """One way to choose from a glob's braces."""

    text: str
    """The glob without braces."""
    chosen: frozenset[int]
    """Positions in the pattern at which the chosen alternatives start."""


class Pattern(NamedTuple):
    """A compiled pattern."""

    text: str
    regex: re.Pattern[str]
    """Must match the whole of `prefix + name`."""
    prefix: str
    expansions: tuple[Expansion, ...]
    """Empty for a regular expression."""
    alternatives: dict[int, str]
    """Start → text of each alternative inside braces."""

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the dotted `name`, whole."""
        return self.regex.fullmatch(self.prefix + name) is not None


def compile_pattern(text: str) -> Pattern:
    """Compile a glob, or a regular expression after `re:`, into one regex.

    In a glob `*` is any text within one name, `**` (a whole name) any number of names or none, and `{a,b}`
    alternatives, which may hold dots, `*`, `**` and further braces. Raises TargetError if it cannot be read.
    """
    if text.startswith("re:"):
        return Pattern(text, _compiled(text, text.removeprefix("re:")), "", (), {})
    expansions, alternatives = _Braces(text).read()
    bodies = dict.fromkeys(_glob_regex(text, expansion.text) for expansion in expansions)
    return Pattern(text, _compiled(text, "|".join(bodies)), ".", tuple(expansions), alternatives)


def dead_alternatives(pattern: Pattern, names: Iterable[str]) -> list[str]:
    """The alternatives in braces that match none of `names`, in the order they are written."""
    names = list(names)
    alive: set[int] = set()
    for expansion in pattern.expansions:
        if not expansion.chosen <= alive:
            regex = re.compile(_glob_regex(pattern.text, expansion.text))
            if any(regex.fullmatch(f".{name}") for name in names):
                alive |= expansion.chosen
    return [text for start, text in sorted(pattern.alternatives.items()) if start not in alive]


def _compiled(text: str, regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        raise TargetError(f"`{text}` is not a regular expression: {error}. Write a literal dot as `\\.`.") from error


def _glob_regex(pattern: str, glob: str) -> str:
    """The regex of a glob without braces, for names with a dot put before them: `.a.b`.

    With that dot every name is the same shape, so that `**` can stand for none without a special case.
    """
    return "".join(_name_regex(pattern, name) for name in glob.split("."))


def _name_regex(pattern: str, name: str) -> str:
    if name == "**":
        return r"(?:\.[^.]+)*"
    if not name:
        raise TargetError(f"`{pattern}` has an empty name: two dots in a row, or a dot at an end. Remove the dot.")
    if "**" in name:
        raise TargetError(f"`{pattern}`: `**` stands for whole names, got `{name}`. Write `*` within a name.")
    odd = re.search(r"[^\w*-]", name)
    if odd:
        said = f"`{pattern}`: `{odd[0]}` is not allowed in a glob; it may hold names, `.`, `*`, `**` and `{{a,b}}`."
        raise TargetError(f"{said} Start the pattern with `re:` for a regular expression.")
    return r"\." + re.escape(name).replace(r"\*", "[^.]*")


class _Braces:
    """Reads `{a,b}` groups by recursive descent."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.alternatives: dict[int, str] = {}

    def read(self) -> tuple[list[Expansion], dict[int, str]]:
        expansions = self._sequence(depth=0)
        return expansions, self.alternatives

    def _sequence(self, depth: int) -> list[Expansion]:
        """Read up to the `,` or `}` that ends an alternative, or to the end of the text."""
        found = [Expansion("", frozenset())]
        while self.at < len(self.text):
            letter = self.text[self.at]
            if letter in ",}":
                if depth:
                    return found
                raise TargetError(f"`{self.text}`: `{letter}` at position {self.at + 1} stands outside braces.")
            self.at += 1
            piece = self._group(depth + 1) if letter == "{" else [Expansion(letter, frozenset())]
            found = [Expansion(a.text + b.text, a.chosen | b.chosen) for a in found for b in piece]
            if len(found) > MAX_EXPANSIONS:
                raise TargetError(f"`{self.text}` has more than {MAX_EXPANSIONS} alternatives. Split the rule.")
        return found

    def _group(self, depth: int) -> list[Expansion]:
        """Read the alternatives after a `{`, and its `}`."""
        opened = self.at
        found: list[Expansion] = []
        while True:
            start = self.at
            found += [Expansion(text, chosen | {start}) for text, chosen in self._sequence(depth)]
            if self.at == len(self.text):
                raise TargetError(f"`{self.text}`: the `{{` at position {opened} is never closed. Add a `}}`.")
            self.alternatives[start] = self.text[start : self.at]
            self.at += 1
            if self.text[self.at - 1] == "}":
                return found
