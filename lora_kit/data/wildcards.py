r"""Wildcards in captions: `{red|green}` becomes one of its parts. They nest; a backslash keeps `{`, `|`, `}`, `\`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import product

Choose = Callable[[int, Sequence[str]], str]
"""(number of the wildcard within its text, its choices) → the one to take."""

_PIECE = re.compile(r"\\[{|}\\]|[{|}]|[^{|}\\]+|\\")


def expand(text: str, choose: Choose) -> str:
    """Replace each wildcard by the choice that `choose` takes; inner ones first, whether or not they are then used.

    Without a wildcard around them `|` and `}` are themselves; so is a `{` that is never closed.
    """
    return _walk(text, choose)[0]


def is_balanced(text: str) -> bool:
    """Whether every brace that no backslash keeps has its other half."""
    return _walk(text, lambda _, choices: choices[0])[1]


def all_expansions(text: str, limit: int) -> list[str] | None:
    """Every text that `expand` can give, the first choices' first; None if there are more than `limit` ways to choose.

    Ways are counted, not texts: `{a|a}` has two, and so has a choice within one that is not taken.
    """
    counts: list[int] = []

    def count(_: int, choices: Sequence[str]) -> str:
        counts.append(len(choices))
        return choices[0]

    expand(text, count)
    if math.prod(counts) > limit:
        return None
    found: dict[str, None] = {}
    for picks in product(*map(range, counts)):
        found[expand(text, lambda number, choices, picks=picks: choices[picks[number]])] = None
    return list(found)


def _walk(text: str, choose: Choose) -> tuple[str, bool]:
    """The expanded text, and whether its braces match. One pass: `open_` holds the choices of the wildcards that
    are not closed yet, outermost first, below them the text itself."""
    open_: list[list[str]] = [[""]]
    number, balanced = 0, True
    for piece in _PIECE.findall(text):
        inside = len(open_) > 1
        if piece == "{":
            open_.append([""])
        elif piece == "|" and inside:
            open_[-1].append("")
        elif piece == "}" and inside:
            chosen = choose(number, open_.pop())
            number += 1
            open_[-1][-1] += chosen
        else:
            balanced = balanced and piece != "}"
            open_[-1][-1] += piece[-1] if len(piece) == 2 and piece[0] == "\\" else piece
    while len(open_) > 1:
        balanced = False
        kept = "|".join(open_.pop())
        open_[-1][-1] += "{" + kept
    return open_[0][0], balanced
