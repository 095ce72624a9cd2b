"""`data.sources` → records: find each source, tell what kind it is, and read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_kit.data.records import Records, settle_flaws
from lora_kit.data.sources.folder import read_folder
from lora_kit.data.sources.hub import TABLE_BUILDERS, is_saved, read_hub
from lora_kit.data.sources.masks import add_masks, part_masks
from lora_kit.data.sources.metadata import METADATA_NAMES
from lora_kit.data.sources.patterns import matching_files
from lora_kit.data.sources.shards import COMPRESSED_SUFFIXES, SHARD_SUFFIX, read_shards
from lora_kit.data.sources.shares import balanced_repeats, weighted_repeats
from lora_kit.data.sources.source import PICTURE_SUFFIXES, Found, Place, has_suffix, list_files
from lora_kit.errors import DataError, did_you_mean
from lora_kit.recipe import DataSection, SourceSection, describe_lookup, expand_sources, is_pattern

TEXT_TABLES = ("metadata.jsonl", "metadata.csv")  # beside a metadata.parquet pictures must lie: it may hold them
_MOST_SAMPLES = 50_000_000  # an epoch's order takes 8 bytes a sample


def open_records(section: DataSection, folder: Path | None = None) -> Records:
    """The records of all sources, in a stable order. Reads captions, opens no picture.

    folder: what relative paths are relative to; by default the current folder (`load_recipe` has made them
    absolute). `Record.source` is the index in the sources of `expand_sources(section)`, which differ from the
    section's own only for a data-set TOML that load_recipe has not read.
    Raises DataError: a source is missing, empty, or lacks a column; or captions or files are missing and `on_error`
    is `raise`. RecipeError: a data-set TOML cannot be followed.
    """
    folder = folder or Path.cwd()
    section = expand_sources(section, folder)
    found = [_read(place) for place in _places(section, folder)]
    _weigh(section, found)
    return gather(found, section.on_error)


def read_local(section: DataSection, folder: Path) -> list[Found | None]:
    """What each source holds, None for those of the hub; for a section whose data-set TOMLs are expanded.

    Repeats are those of `open_records`, unless a source is on the hub: weights depend on all of them.
    """
    found = [None if place.path is None else _read(place) for place in _places(section, folder)]
    known = [part for part in found if part is not None]
    if len(known) == len(found):
        _weigh(section, known)
    return found


def gather(found: Sequence[Found], on_error: str) -> Records:
    """All sources' records as one. Raises DataError for flaws, as `on_error` says."""
    records = [record for part in found for record in part.records]
    flaws = [flaw for part in found for flaw in part.flaws]
    settle_flaws(flaws, len(records), on_error)
    return Records(records, flaws, [notice for part in found for notice in part.notices])


def count_records(section: DataSection, folder: Path | None = None) -> int:
    """Samples in one epoch: usable records times their repeats. Arguments and errors as of `open_records`."""
    return sum(record.repeats for record in open_records(section, folder))


def _weigh(section: DataSection, found: Sequence[Found]) -> None:
    """Multiply the records' repeats so that the sources' shares are their weights', if they have any."""
    weights = [source.weight for source in section.sources if source.weight is not None]
    if len(weights) != len(found):
        _balance(found)
        return
    samples = [sum(record.repeats for record in part.records) for part in found]
    repeats = weighted_repeats(samples, weights)
    epoch = sum(count * times for count, times in zip(samples, repeats, strict=True))
    if epoch > _MOST_SAMPLES:
        rarest = repeats.index(min(repeats))
        raise DataError(
            f"data.sources: these weights make an epoch of {epoch:,} samples, over {_MOST_SAMPLES:,}: source {rarest} "
            f"has {samples[rarest]:,} samples and a share of {weights[rarest] / sum(weights):.2g}. Raise its weight."
        )
    for part, times in zip(found, repeats, strict=True):
        part.records = [replace(record, repeats=record.repeats * times) for record in part.records]
    shares = ", ".join(
        f"{source.path} × {times} = {count * times / epoch:.1%}"
        for source, times, count in zip(section.sources, repeats, samples, strict=True)
    )
    found[0].notices.append(f"Weights as repeats, and each source's share of the samples: {shares}.")


def _balance(found: Sequence[Found]) -> None:
    """Repeat regularisation pictures until there are as many samples of them as of the others: the usual 1 : 1."""
    others = sum(record.repeats for part in found for record in part.records if not record.is_regularisation)
    mine = [record for part in found for record in part.records if record.is_regularisation]
    if not mine or not others:
        return
    repeats = iter(balanced_repeats([record.repeats for record in mine], others))
    for part in found:
        part.records = [
            replace(record, repeats=next(repeats)) if record.is_regularisation else record for record in part.records
        ]
    before = sum(record.repeats for record in mine)
    if before < others:
        found[0].notices.append(
            f"Regularisation pictures: {before:,} samples in an epoch, repeated to the {others:,} of the other "
            "pictures. Give every source a weight for another share."
        )


def _places(section: DataSection, folder: Path) -> list[Place]:
    sources = section.sources
    paths = [_locate(source, index, folder) for index, source in enumerate(sources)]
    names = [_name(source, path) for path, source in zip(paths, sources, strict=True)]
    shared = {name for name, count in Counter(names).items() if count > 1}
    labels = [f"{name}@{index}" if name in shared else name for index, name in enumerate(names)]
    return [
        Place(_as_told(source, section), index, labels[index], paths[index], source.alpha or section.alpha)
        for index, source in enumerate(sources)
    ]


def _as_told(source: SourceSection, section: DataSection) -> SourceSection:
    """Where templates stand for captions, pictures need none."""
    by_template = bool((source.captions or section.captions).templates) and not source.regularisation
    return source.model_copy(update={"caption_fallback": source.caption_fallback or ""}) if by_template else source


def _name(source: SourceSection, path: Path | None) -> str:
    if path is None:
        return source.path
    return path.name if path.exists() else path.parent.name  # a pattern: the folder that its files lie in


def _locate(source: SourceSection, index: int, folder: Path) -> Path | None:
    """The source's absolute path; None if it can only be a data set of the hub."""
    path = (folder / source.path).absolute()
    if path.exists() or is_pattern(source.path):
        return path
    parts = Path(source.path).parts
    is_id = len(parts) <= 2 and not Path(source.path).is_absolute() and not source.path.startswith((".", "~"))
    # `data/cats` beside an existing folder `data` is a slip of the pen, not a user `data` of the hub.
    if is_id and not (len(parts) == 2 and path.parent.is_dir()):
        return None
    hint = did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
    lookup = describe_lookup(source.path, folder)
    raise DataError(f"data.sources.{index}.path: no file or folder {source.path!r}: {lookup}.{hint}")


def _read(place: Place) -> Found:
    if place.path is None:
        return read_hub(place)
    if place.path.is_dir():
        return _not_empty(_read_folder(place, place.path), place)
    if place.path.name in METADATA_NAMES:
        raise DataError(f"{place.origin}: name the folder that {place.path.name} lies in: {place.path.parent}.")
    if place.path.name.lower().endswith(COMPRESSED_SUFFIXES):
        raise DataError(
            f"{place.origin}: a compressed archive is read from its beginning only. Unpack it to .tar, or to a folder."
        )
    if place.path.suffix.lower() == SHARD_SUFFIX or is_pattern(place.section.path):
        shards = [place.path] if place.path.exists() else matching_files(place.path, place.origin)
        return _not_empty(read_shards(place, shards), place)
    return read_hub(place)


def _read_folder(place: Place, folder: Path) -> Found:
    listed = [name for name in list_files(folder) if place.section.nested or "/" not in name]
    files, masks = part_masks(listed, place.section.mask_suffix)
    if is_saved(files):
        return read_hub(place, saved=True)
    has_pictures = any(has_suffix(name, PICTURE_SUFFIXES) for name in files)
    is_table = any(name in TEXT_TABLES for name in files) or place.section.metadata_file is not None
    if not has_pictures and not is_table:
        if any(has_suffix(name, frozenset(TABLE_BUILDERS)) for name in files):
            return read_hub(place)
        shards = [folder / name for name in files if has_suffix(name, frozenset({SHARD_SUFFIX}))]
        if shards:
            return read_shards(place, shards)
    if place.section.streaming:
        raise DataError(f"{place.origin}: streaming does nothing with a folder of pictures, which is read in place.")
    return add_masks(place, read_folder(place, folder, files), masks, folder)


def _not_empty(found: Found, place: Place) -> Found:
    if found.records or found.flaws:
        return found
    notices = "".join(f" {notice}" for notice in found.notices)
    kinds = ", ".join(sorted(PICTURE_SUFFIXES))
    raise DataError(f"{place.origin}: no captioned picture in it. Looked for {kinds}, and below its folders.{notices}")
