"""A held-out part of the training pictures, picked by what is in the files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lora_kit.data.cache.hints import PictureHints
from lora_kit.data.cache.origin import identity, read_bytes
from lora_kit.data.cache.pictures import known_size
from lora_kit.data.records import Record, Records
from lora_kit.data.sizes import read_sizes
from lora_kit.data.sources import open_records
from lora_kit.data.training_set import TrainingSet, plain_section
from lora_kit.errors import DataError
from lora_kit.progress import ProgressBar, progress
from lora_kit.recipe import DataSection, SplitSection, expand_sources


class Parts(NamedTuple):
    """Records on either side: no picture's bytes are on both."""

    training: list[Record]
    held_out: list[Record]
    """Each picture once."""
    left_out: int
    """Records on neither side: further copies of held-out pictures."""


def open_parted_sets(
    section: DataSection,
    split: SplitSection,
    seed: int,
    bar: ProgressBar = progress,
    hints: PictureHints | None = None,
    latent_factor: int = 8,
) -> list[TrainingSet]:
    """The training set and the held-out set of one data section.

    Reads every picture's bytes once, but for those that `hints` knows. Raises DataError if either side has none, and
    as `open_training_set`.
    """
    section = expand_sources(section, Path.cwd())
    records = open_records(section)
    digests = picture_digests(records, hints, bar)
    parts = part_records(records, digests, split)
    known = known_size(hints) if hints else None

    def made(part: DataSection, records: Records) -> TrainingSet:
        sizes = read_sizes(records, part.workers, bar, known) if part.buckets else None
        return TrainingSet(records, part, seed, sizes=sizes, latent_factor=latent_factor)

    notices = [*records.notices, _said(parts, sum(digest is None for digest in digests))]
    training = made(section, Records(parts.training, records.skipped, notices))
    return [training, made(plain_section(section, section.sources), Records(parts.held_out))]


def part_records(records: Sequence[Record], digests: Sequence[bytes | None], split: SplitSection) -> Parts:
    """Records whose pictures are held out, and the others; repeats are as they were.

    digests: SHA-256 of each picture's bytes; None, where it cannot be read, is never held out. Regularisation pictures
    and those of `target: base` are no examples of what is learnt, so they are not measured on; but where their bytes
    are held out as another source's, they are not trained on either.
    """
    eligible = {
        digest: index
        for index, digest in reversed(list(enumerate(digests)))
        if digest is not None and not records[index].is_regularisation and not records[index].from_base
    }
    places = {digest: _place(digest) for digest in eligible}
    if split.fraction is not None:
        chosen = {digest for digest, place in places.items() if place < split.fraction}
    else:
        chosen = set(sorted(places, key=lambda digest: (places[digest], digest))[: split.count])
    held_out = [records[eligible[digest]] for digest in sorted(chosen, key=lambda digest: eligible[digest])]
    training = [record for record, digest in zip(records, digests, strict=True) if digest not in chosen]
    _check(len(eligible), len(held_out), any(not record.is_regularisation for record in training))
    return Parts(training, held_out, len(records) - len(training) - len(held_out))


def picture_digests(records: Sequence[Record], hints: PictureHints | None, bar: ProgressBar) -> list[bytes | None]:
    """SHA-256 of each picture's bytes, without its mask's; None where it cannot be read, which is told later."""
    return [_digest(record, hints) for record in bar(records, "Hashing pictures", len(records))]


def _digest(record: Record, hints: PictureHints | None) -> bytes | None:
    if hints is not None and record.mask is None:
        name = identity(record)
        facts = hints.find(name) if name is not None else None
        if facts is not None:
            return facts.sha256
    try:
        return hashlib.sha256(read_bytes(record)[0]).digest()
    except DataError:  # named by the scan of all pictures, as `data.on_error` says
        return None


def _place(digest: bytes) -> float:
    """Uniform over 0..1; hashed again, so that it is independent of whatever else looks at the digest."""
    return int.from_bytes(hashlib.sha256(b"held out\x1f" + digest).digest()[:8], "big") / 2**64


def _check(pictures: int, held_out: int, rest: bool) -> None:
    fix = "Use `count`, another `fraction`, or more pictures."
    if not held_out:
        raise DataError(f"validation.held_out: none of the {pictures} different pictures falls into that part. {fix}")
    if not rest:
        raise DataError(
            f"validation.held_out: all {pictures} different pictures would be held out, none trained. {fix}"
        )


def _said(parts: Parts, unread: int) -> str:
    copies = f", with {parts.left_out} more copies of them left out" if parts.left_out else ""
    bad = f"; {unread} pictures cannot be read, and are not held out" if unread else ""
    return f"Held out: {len(parts.held_out)} pictures{copies}; trained on: {len(parts.training)}{bad}."
