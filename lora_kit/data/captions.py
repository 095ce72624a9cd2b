"""A record's captions → the text that the model is told, by `data.captions`; pure functions of their arguments.

Order of work: lines, replace, choose or join, wildcards, underscores, tags (kept, dropped, shuffled), prefix and
suffix, trigger.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from lora_kit.data.records import Record, name_some
from lora_kit.data.wildcards import Choose, all_expansions, expand, is_balanced
from lora_kit.recipe import CaptionRules, DataSection
from lora_kit.recipe.templates import HOLE, sentences

_MANTISSA = 1 << 53
_WORD_WITH_UNDERSCORE = re.compile(r"[^\s,]*_[^\s,]*")
_TWO_LETTERS = re.compile(r"[^\W_]{2}")


class CaptionChances(NamedTuple):
    """Independent uniform draws for one sample's caption. Each has its use, so turning one on moves no other."""

    seed: int
    epoch: int
    sample: int
    """Number within the epoch's unshuffled list."""

    def draw(self, use: str, index: int = 0) -> float:
        """The draw in [0, 1) for the index-th thing of this use."""
        text = "\x1f".join(map(str, ("caption", use, *self, index)))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) / _MANTISSA

    def pick(self, count: int, use: str, index: int = 0) -> int:
        """One of 0 … count - 1, all equally likely."""
        return int(self.draw(use, index) * count)


class Captioner:
    """Makes the captions of a data set's records, each by its source's rules."""

    def __init__(self, section: DataSection):
        self._trigger = section.trigger
        self._own = section.captions
        self._sources = section.sources

    def caption(self, record: Record, chances: CaptionChances | None = None) -> str:
        """The caption as this sample is told it. Without `chances` nothing is drawn: `CaptionRules` says what then."""
        return self._triggered(record, caption_of(self._texts(record), self._rules(record), chances))

    def longest(self, record: Record) -> list[str]:
        """Each of the record's captions with all its tags and, by letters, the longest choice of every wildcard.

        What to count over-long captions by.
        """
        return [self._triggered(record, text) for text in longest_captions(self._texts(record), self._rules(record))]

    def possible(self, record: Record, limit: int) -> list[str] | None:
        """All captions that `caption` can give, the plain one first; with a limit of 1, the one that never varies.

        None if there are more than `limit` ways to choose wildcards or captions, or tags are shuffled or dropped.
        The empty one of `data.caption_dropout` is not among them.
        """
        texts = possible_captions(self._texts(record), self._rules(record), limit)
        return None if texts is None else [self._triggered(record, text) for text in texts]

    def notices(self, records: Sequence[Record]) -> list[str]:
        """What the user should be told once: wildcards whose braces do not match are taken as they are."""
        odd = [record.id for record in records if not self._is_balanced(record)]
        if not odd:
            return []
        return [f"{len(odd)} captions have a brace without its other half, taken as written: {name_some(odd)}."]

    def _is_balanced(self, record: Record) -> bool:
        rules = self._rules(record)
        if not rules.wildcards:
            return True
        return all(map(is_balanced, (rules.prefix, rules.suffix, *variants(self._texts(record), rules))))

    def _rules(self, record: Record) -> CaptionRules:
        return self._sources[record.source].captions or self._own

    def _texts(self, record: Record) -> tuple[str, ...]:
        """The record's captions, or the templates that stand for them."""
        if not self._is_told_by_template(record):
            return captions_of(record)
        return tuple(text.replace(HOLE, self._trigger) for text in sentences(self._rules(record)))

    def _is_told_by_template(self, record: Record) -> bool:
        return bool(self._rules(record).templates) and not record.is_regularisation

    def _triggered(self, record: Record, text: str) -> str:
        if self._is_told_by_template(record):
            return text  # which has the trigger in it
        asked = self._rules(record).trigger
        is_put = not record.is_regularisation if asked is None else asked
        return f"{self._trigger if is_put else ''} {text}".strip()


def captions_of(record: Record) -> tuple[str, ...]:
    """All captions that a source gave this record."""
    return record.captions or (record.caption,)


def caption_of(captions: Sequence[str], rules: CaptionRules, chances: CaptionChances | None = None) -> str:
    """One record's caption, without the trigger word. Without `chances` nothing is drawn."""
    texts = variants(captions, rules)
    text = texts[chances.pick(len(texts), "choose")] if chances is not None else texts[0]
    parts = (rules.prefix, text, rules.suffix)
    if rules.wildcards:
        parts = tuple(expand(part, _choice(use, chances)) for use, part in zip(_PARTS, parts, strict=True))
    return _assemble(parts, rules, chances)


def longest_captions(captions: Sequence[str], rules: CaptionRules) -> list[str]:
    """`Captioner.longest`, without the trigger word."""
    found: list[str] = []
    for text in variants(captions, rules):
        parts = (rules.prefix, text, rules.suffix)
        if rules.wildcards:
            parts = tuple(expand(part, lambda _, choices: max(choices, key=len)) for part in parts)
        found.append(_assemble(parts, rules, None))
    return found


def possible_captions(captions: Sequence[str], rules: CaptionRules, limit: int) -> list[str] | None:
    """`Captioner.possible`, without the trigger word."""
    found: dict[str, None] = {}
    for text in variants(captions, rules):
        ways = [_expansions(part, rules, limit) for part in (rules.prefix, text, rules.suffix)]
        known = [way for way in ways if way is not None]
        if len(known) < len(ways):
            return None
        for parts in product(*known):
            if tags_vary(parts[1], rules):
                return None
            found[_assemble(parts, rules, None)] = None
            if len(found) > limit:
                return None
    return list(found)


def variants(captions: Sequence[str], rules: CaptionRules) -> list[str]:
    """The captions that `choose` leaves to draw from, at least one, with `replace` done and wildcards still in."""
    if rules.lines:
        captions = [line.strip() for caption in captions for line in caption.splitlines() if line.strip()]
    texts = [_replaced(caption, rules) for caption in captions] or [""]
    if rules.choose == "join":
        return [_joint(rules).join(texts)]
    return texts[:1] if rules.choose == "first" else texts


def tags_vary(text: str, rules: CaptionRules) -> bool:
    """Whether chance can move or drop tags of this caption, whose wildcards are chosen."""
    free = _parted(text, rules).free
    return (rules.shuffle and len(set(free)) > 1) or (rules.tag_dropout > 0 and bool(free))


class _Parted(NamedTuple):
    """A caption's tags."""

    first: list[str]
    free: list[str]
    """Those that may be moved and dropped."""
    last: list[str]


_PARTS = ("prefix", "wildcard", "suffix")


def _expansions(text: str, rules: CaptionRules, limit: int) -> list[str] | None:
    return all_expansions(text, limit) if rules.wildcards else [text]


def _choice(use: str, chances: CaptionChances | None) -> Choose:
    if chances is None:
        return lambda _, choices: choices[0]
    return lambda index, choices: choices[chances.pick(len(choices), use, index)]


def _replaced(text: str, rules: CaptionRules) -> str:
    for find, put in rules.replace.items():
        text = re.sub(find[3:], put, text) if find.startswith("re:") else text.replace(find, put)
    return text


def _assemble(parts: Sequence[str], rules: CaptionRules, chances: CaptionChances | None) -> str:
    """Prefix, text and suffix, wildcards chosen → the caption."""
    prefix, text, suffix = parts
    if rules.underscores_to_spaces:
        text = _WORD_WITH_UNDERSCORE.sub(_spaced, text)
    if rules.shuffle or rules.tag_dropout or rules.keep_separator is not None:
        text = _retagged(text, rules, chances)
    prefix, suffix = prefix.strip(), suffix.strip()
    gap = "" if not suffix or suffix[0] in ",.;:!?" else " "
    return f"{f'{prefix} {text}'.strip()}{gap}{suffix}".strip() if prefix or suffix else text


def _spaced(word: re.Match[str]) -> str:
    return word[0].replace("_", " ") if _TWO_LETTERS.search(word[0]) else word[0]


def _retagged(text: str, rules: CaptionRules, chances: CaptionChances | None) -> str:
    first, free, last = _parted(text, rules)
    if chances is not None:
        # Draws go by a tag's place in the caption: what one tag meets does not depend on the others.
        places = [i for i in range(len(free)) if chances.draw("drop", i) >= rules.tag_dropout]
        if rules.shuffle:
            places.sort(key=lambda i: chances.draw("shuffle", i))
        free = [free[i] for i in places]
    return _joint(rules).join([*first, *free, *last])


def _parted(text: str, rules: CaptionRules) -> _Parted:
    mark = rules.keep_separator
    if mark is not None and mark in text:
        first, free, *last = text.split(mark, 2)
        return _Parted(_tags(first, rules), _tags(free, rules), _tags(last[0] if last else "", rules))
    tags = _tags(text, rules)
    return _Parted(tags[: rules.keep_tags], tags[rules.keep_tags :], [])


def _tags(text: str, rules: CaptionRules) -> list[str]:
    return [tag.strip() for tag in text.split(rules.separator) if tag.strip()]


def _joint(rules: CaptionRules) -> str:
    """What is put between tags: the separator and a space."""
    return rules.separator.rstrip() + " "
