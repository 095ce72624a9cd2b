"""The `captions:` section of a data set, and of a source: how a record's caption becomes what the model is told."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lora_kit.recipe.base import Fraction, NonNegative, Problem, Section, refuse

LongText = Literal["cut", "chunks"]


class CaptionRules(Section):
    """What is done to captions, in the fields' order. Every draw is a function of (seed, epoch, sample).

    Held-out pictures get their captions without chance: the first one, every tag in its order, the first choice of
    each wildcard.
    """

    lines: bool = False
    """Each line of a caption is a caption of its own: a `.txt` file then holds several. Off: line breaks are spaces
    to the tokenizer."""
    replace: dict[str, str] = Field(default={})
    """Text to find → what to put there, one after the other, in every caption. `re:` starts a regular expression
    (`\\1` in the replacement is its first group); without it letter by letter, case included."""
    choose: Literal["random", "first", "join"] = "random"
    """Which of a picture's captions is told, where it has several: one drawn anew each epoch, the first always, or
    all, with `separator` between them."""
    wildcards: bool = False
    """`{red|green|dark {red|blue}}` in a caption, prefix or suffix becomes one of its parts, drawn anew each epoch. A
    backslash keeps `{`, `|`, `}` and itself as they are. Off: braces may be part of a caption."""
    underscores_to_spaces: bool = False
    """`long_hair` becomes `long hair`, as the text encoder knows it. Smileys such as `^_^` and `o_o` stay: words
    without two letters or digits side by side."""
    separator: Annotated[str, Field(min_length=1)] = ","
    """What stands between tags. Where tags are shuffled, dropped or marked, spaces around them become one after the
    separator."""
    keep_tags: NonNegative = 0
    """How many tags at the beginning are never moved or dropped. Such as 1, where each caption begins with its
    subject."""
    keep_separator: Annotated[str, Field(min_length=1)] | None = None
    """A mark such as `|||`: where a caption has it, the tags before it are kept in place instead of the first
    `keep_tags`, and after a second one those behind it. The mark itself is taken out."""
    shuffle: bool = False
    """Put the other tags in a new order each epoch, so that none is learned by its place. For lists of tags, not for
    sentences."""
    tag_dropout: Fraction = 0.0
    """Probability that one of the other tags is left out, each by itself. 0.1 keeps tags from leaning on each other."""
    templates: Literal["object", "style"] | list[str] = Field(default=[])
    """Instead of the pictures' own captions: sentences such as `a photo of {}`, one drawn anew each epoch, with
    `data.trigger` in place of `{}`. For learning a word (`tokens`), as textual inversion does. `object` and `style` are
    lists that come with lora_kit. Pictures then need no captions; regularisation pictures keep theirs."""
    prefix: str = ""
    """Put before the caption, a space between, after `data.trigger`."""
    suffix: str = ""
    """Put after the caption; a space between, unless it begins with `,`, `.`, `;`, `:`, `!` or `?`."""
    trigger: bool | None = None
    """Put `data.trigger` before these captions. Default: yes, except for regularisation pictures, which must not learn
    it."""

    @field_validator("replace")
    @classmethod
    def _replaceable(cls, replace: dict[str, str]) -> dict[str, str]:
        refuse("CaptionRules", _replace_problems(replace))
        return replace

    @model_validator(mode="after")
    def _marks_differ(self) -> CaptionRules:
        refuse("CaptionRules", _mark_problems(self))
        return self


class CaptionSection(CaptionRules):
    """As CaptionRules, with what holds for the whole data set: sources' own captions do not name it."""

    long: LongText = "cut"
    """What happens to captions longer than the text encoder reads (75 tokens for CLIP). `cut`: the end is lost, and a
    notice counts them. `chunks`: every 75 tokens are encoded by themselves and their states put one behind the other,
    as web UIs do; the UNet's cross-attention then costs as much more. Validation pictures follow."""


def _replace_problems(replace: Mapping[str, str]) -> Iterator[Problem]:
    for find, put in replace.items():
        if not find.removeprefix("re:"):
            yield Problem((), f"`{find}` finds nothing; name the text to replace.")
        elif find.startswith("re:"):
            yield from _pattern_problems(find, put)


def _pattern_problems(find: str, put: str) -> Iterator[Problem]:
    try:
        pattern = re.compile(find[3:])
    except re.error as error:
        yield Problem((), f"`{find}` is not a regular expression: {error}.")
        return
    try:
        pattern.sub(put, "")  # reads the replacement's groups whether or not there is anything to replace
    except (re.error, IndexError) as error:
        yield Problem((), f"`{put}` cannot replace `{find}`: {error}. Write a backslash as two.")


def _mark_problems(rules: CaptionRules) -> Iterator[Problem]:
    mark, separator = rules.keep_separator, rules.separator
    if mark is None:
        return
    if not mark.strip():
        yield Problem(("keep_separator",), "is only spaces; write a mark that captions do not hold, such as `|||`.")
    elif mark == separator:
        yield Problem(("keep_separator",), f"is `{mark}`, the same as `separator`; write another, such as `|||`.")
