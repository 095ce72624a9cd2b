"""Which module names a pattern that matches nothing may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import lru_cache

from lora_kit.targeting.globs import Pattern

MAX_EXPANSIONS = 16
"""Expansions of the braces that are compared; each costs some milliseconds."""


def nearest_modules(pattern: Pattern, names: Sequence[str], count: int = 3) -> list[str]:
    """Up to `count` of `names` that come nearest to `pattern`, no two of which differ in numbers alone.

    Nearness is the cost of aligning the pattern's names with the module's: `**` takes any number of names for
    nothing, a name costs its dissimilarity, a name left over costs 1.
    """
    globs = _plain_globs(pattern)
    ranked = sorted(names, key=lambda name: min(_cost(glob, tuple(name.split("."))) for glob in globs))
    different = {re.sub(r"\d+", "#", name): name for name in reversed(ranked)}
    return sorted(different.values(), key=ranked.index)[:count]


def _plain_globs(pattern: Pattern) -> list[tuple[str, ...]]:
    if pattern.expansions:
        return [tuple(expansion.text.split(".")) for expansion in pattern.expansions[:MAX_EXPANSIONS]]
    # A regular expression is read loosely as a glob: this is only for a suggestion.
    text = re.sub(r"\.[*+]\??", "\0", pattern.text.removeprefix("re:")).replace("\\.", ".")
    text = re.sub(r"[\\^$()|?+\[\]{}]", "", text).replace("\0", ".**.")
    return [tuple(name for name in text.split(".") if name)]


def _cost(glob: tuple[str, ...], name: tuple[str, ...]) -> float:
    """Least cost of aligning `glob` with `name`, by dynamic programming over both."""
    row = [float(index) for index in range(len(name) + 1)]
    for part in glob:
        free = part == "**"
        following = [row[0] if free else row[0] + 1]
        for index, own in enumerate(name):
            skip_part, skip_own = (0.0, 0.0) if free else (1.0, 1.0)
            both = row[index] + (1.0 if free else _unlike(part, own))
            following.append(min(both, row[index + 1] + skip_part, following[index] + skip_own))
        row = following
    return row[-1]


@lru_cache(maxsize=4096)
def _unlike(part: str, name: str) -> float:
    """0 where the glob's name matches, else up to 1."""
    if re.fullmatch(re.escape(part).replace(r"\*", ".*"), name):
        return 0.0
    return 1.0 - difflib.SequenceMatcher(None, part.replace("*", ""), name).ratio()
