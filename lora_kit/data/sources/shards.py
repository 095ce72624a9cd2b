"""WebDataset's tar shards: members of one key, `0001.jpg` and `0001.txt`, are a picture and its caption.

An index of the members' places lets pictures be read in any order from where they lie; `datasets`' own reader would
copy every picture into its cache first, and fail as a whole on one sample that lacks a member.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from lora_kit.data.records import Flaw, Record, name_some
from lora_kit.data.sources.masks import part_masks, tell_masks
from lora_kit.data.sources.source import PICTURE_SUFFIXES, Found, Place, inner_path
from lora_kit.data.sources.texts import as_needed, sidecar_suffixes, sidecar_texts
from lora_kit.errors import DataError

SHARD_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


class Span(NamedTuple):
    """Where a member's bytes lie."""

    shard: Path
    offset: int
    size: int


def read_shards(place: Place, shards: Sequence[Path]) -> Found:
    """All captioned pictures of tar shards, in the shards' order; opens no picture.

    Members that are links, or whose names leave the archive, become flaws, as does what follows damage in a shard.
    Raises DataError if a shard cannot be opened at all.
    """
    _refuse_unused(place)
    found, others = Found(kind=_counted(shards)), list[str]()
    for shard in shards:
        name = "" if shard == place.path else f"{_name_in(place, shard)}/"
        _read_shard(place, shard, name, found, others)
    if place.section.mask_suffix is not None:
        tell_masks(place, found, ())
    if others:
        found.notices.append(
            f"{place.origin}: members that are neither pictures nor captions are left out: {len(others)} "
            f"({name_some(others)})."
        )
    return found


def open_span(shard: Path, offset: int, size: int) -> Image.Image:
    """Open the picture whose file lies at this place in a shard."""
    return Image.open(BytesIO(read_span(Span(shard, offset, size))))


def read_span(span: Span) -> bytes:
    """A member's bytes, fewer if the shard ends before."""
    with span.shard.open("rb") as file:
        file.seek(span.offset)
        return file.read(span.size)


def _read_shard(place: Place, shard: Path, name: str, found: Found, others: list[str]) -> None:
    """`name`: what stands between the source's label and a member in ids."""
    spans: dict[str, dict[str, Span]] = {}
    for member in _members(shard, f"{place.label}/{name}".rstrip("/"), found.flaws):
        inner = inner_path(member.name)
        reason = _member_flaw(member, inner)
        if reason:
            found.flaws.append(Flaw(f"{place.label}/{name}{member.name}", reason))
        elif inner is not None and not any(part.startswith(".") for part in inner.split("/")):
            key, ending = _split(inner)
            # As in tar itself, a later member of the same name replaces the earlier one.
            spans.setdefault(key, {})[ending] = Span(shard, member.offset_data, member.size)
    suffixes, masks = sidecar_suffixes(place.section), _take_masks(place, spans)
    with shard.open("rb") as file:
        for key, endings in spans.items():
            pictures = [ending for ending in endings if f".{ending}".lower() in PICTURE_SUFFIXES]
            others += [
                f"{name}{key}.{ending}" for ending in endings if ending not in pictures and f".{ending}" not in suffixes
            ]
            if pictures:
                result = _record(place, _Sample(name + key, pictures, endings), file)
                if isinstance(result, Record) and key in masks:
                    result = replace(result, mask=partial(open_span, *masks[key]))
                found.add(result)


def _take_masks(place: Place, spans: dict[str, dict[str, Span]]) -> dict[str, Span]:
    """Key → its mask, taken out of the members; `0001-mask.png` is a key of its own, `0001.mask.png` an ending."""
    names = {f"{key}.{ending}": (key, ending) for key, endings in spans.items() for ending in endings}
    _, found = part_masks(names, place.section.mask_suffix)
    return {stem: spans[names[name][0]].pop(names[name][1]) for stem, name in found.items()}


class _Sample(NamedTuple):
    key: str
    pictures: list[str]
    """The endings that are a picture's."""
    spans: dict[str, Span]
    """By ending."""


def _record(place: Place, sample: _Sample, file: BinaryIO) -> Record | Flaw:
    inner = f"{sample.key}.{sample.pictures[0]}"
    if len(sample.pictures) > 1:
        return Flaw(f"{place.label}/{inner}", f"its key has several pictures, {' and '.join(sample.pictures)}")

    def read(name: str) -> bytes:
        span = sample.spans[name.removeprefix(f"{sample.key}.")]
        file.seek(span.offset)
        return file.read(span.size)

    present = [f"{sample.key}.{ending}" for ending in sample.spans]
    texts = as_needed(place.section, sidecar_texts(place.section, sample.key, present, read))
    if isinstance(texts, str):
        return Flaw(f"{place.label}/{inner}", texts)
    return place.record(inner, texts, partial(open_span, *sample.spans[sample.pictures[0]]))


def _members(shard: Path, shard_id: str, flaws: list[Flaw]) -> Iterator[tarfile.TarInfo]:
    """Everything in a shard but folders. Damage ends it, and becomes a flaw if something came before."""
    count = 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                count += 1
                # tarfile would keep every header in memory: 300 MB for 100,000 pictures.
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue] (stub lacks it)
                if not member.isdir():
                    yield member
            _check_end(shard, archive.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        if not count:
            raise DataError(f"{shard} is not a readable tar archive: {error}.") from error
        flaws.append(Flaw(shard_id, f"damaged after {count} members ({error}); what follows is lost"))


def _check_end(shard: Path, offset: int) -> None:
    """tarfile takes a header that it cannot read for the archive's end, which is a block of zeros or of nothing."""
    if read_span(Span(shard, offset, tarfile.BLOCKSIZE)).strip(b"\0"):
        raise tarfile.ReadError("bad header")


def _member_flaw(member: tarfile.TarInfo, inner: str | None) -> str:
    if inner is None:
        return "its name leaves the archive; only members within it are read"
    if member.issym() or member.islnk():
        return f"is a link to {member.linkname!r}; links are not followed"
    if not member.isreg() or member.issparse():
        return "is no plain file"
    return ""


def _split(inner: str) -> tuple[str, str]:
    """(key, ending): as WebDataset has it, the key ends at the first dot of the name."""
    folder, slash, name = inner.rpartition("/")
    key, _, ending = name.partition(".")
    return f"{folder}{slash}{key}", ending


def _name_in(place: Place, shard: Path) -> str:
    assert place.path is not None
    root = place.path if place.path.is_dir() else place.path.parent
    return shard.relative_to(root).as_posix() if shard.is_relative_to(root) else shard.name


def _counted(shards: Sequence[Path]) -> str:
    return "1 tar shard" if len(shards) == 1 else f"{len(shards):,} tar shards"


def _refuse_unused(place: Place) -> None:
    section = place.section
    settings = {
        "where": bool(section.where),
        "streaming": section.streaming,
        "metadata_file": section.metadata_file is not None,
        "layout": section.layout == "kohya",
        "mask_folder": section.mask_folder is not None,
        "mask_column": section.mask_column is not None,
    }
    unused = [name for name, is_set in settings.items() if is_set]
    if unused:
        raise DataError(f"{place.origin}: {', '.join(unused)} does nothing with tar shards. Remove it.")
