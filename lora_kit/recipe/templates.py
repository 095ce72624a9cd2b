"""Sentences that stand for a picture's own caption while a new word is learned (Gal et al. 2022, section 3.1: "A photo
of S*"), and what is wrong with those of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lora_kit.recipe.base import Problem

if TYPE_CHECKING:
    from lora_kit.recipe.captions import CaptionRules
    from lora_kit.recipe.sources import SourceSection

HOLE = "{}"
"""Where `data.trigger` goes."""
NAMED: Mapping[str, Sequence[str]] = {
    "object": (
        "a photo of {}",
        "a picture of {}",
        "a close-up photo of {}",
        "a bright photo of {}",
        "a dark photo of {}",
        "a photo of one {}",
        "a photo of the {}",
        "a good photo of {}",
        "a photo of {}, seen from near",
        "a photo of {}, seen from afar",
        "a cropped photo of {}",
        "a rendering of {}",
        "a depiction of {}",
        "an image showing {}",
    ),
    "style": (
        "a painting in the style of {}",
        "a picture in the style of {}",
        "a drawing in the style of {}",
        "a close-up in the style of {}",
        "a rendering in the style of {}",
        "a scene in the style of {}",
        "a bright picture in the style of {}",
        "a dark picture in the style of {}",
        "a small painting in the style of {}",
        "a large painting in the style of {}",
        "an image in the style of {}",
        "a depiction in the style of {}",
    ),
}


def sentences(rules: CaptionRules) -> Sequence[str]:
    """The rules' templates, one by one; empty: pictures have their own captions."""
    return NAMED[rules.templates] if isinstance(rules.templates, str) else rules.templates


def template_problems(trigger: str, own: CaptionRules, sources: Sequence[SourceSection]) -> Iterator[Problem]:
    """What is wrong with the templates of a data set, and of its sources."""
    placed = [(("captions",), own)]
    placed += [(("sources", index, "captions"), one.captions) for index, one in enumerate(sources) if one.captions]
    for path, rules in placed:
        if not rules.templates:
            continue
        if not trigger.strip():
            said = "are told with `data.trigger` in them, and there is none; write the word that is learned there."
            yield Problem((*path, "templates"), said)
        for index, text in enumerate(sentences(rules)):
            if HOLE not in text:
                said = f"got {text!r}; a template says with {{}} where the word goes: `a photo of {{}}`."
                yield Problem((*path, "templates", index), said)
