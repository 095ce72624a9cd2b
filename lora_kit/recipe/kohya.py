"""sd-scripts' data-set TOML → sources: each subset one, and what all of them share into `data`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_kit.recipe.base import Problem, shown
from lora_kit.recipe.kohya_keys import Subset, is_toml, read_subsets
from lora_kit.recipe.kohya_sizes import (
    BUCKET_FIELDS,
    own_resolution,
    shared_resolution,
    size_fields,
    size_problems,
)
from lora_kit.recipe.messages import problems_in, recipe_error
from lora_kit.recipe.paths import absolute
from lora_kit.recipe.sections import DataSection
from lora_kit.recipe.sources import SourceSection

_SOURCE_FIELDS = {
    "num_repeats": "repeats",
    "caption_extension": "caption_suffix",
    "class_tokens": "caption_fallback",
    "is_reg": "regularisation",
}
_CAPTION_FIELDS = {
    "shuffle_caption": "shuffle",
    "keep_tokens": "keep_tags",
    "keep_tokens_separator": "keep_separator",
    "caption_separator": "separator",
    "caption_tag_dropout_rate": "tag_dropout",
    "enable_wildcard": "wildcards",
}
# Key → field of `data`, and what sd-scripts takes where a subset has no such key.
_DATA_FIELDS: dict[str, tuple[str, Any]] = {
    "batch_size": ("batch_size", 1),
    "flip_aug": ("flip", False),
    "random_crop": ("crop", False),
    "caption_dropout_rate": ("caption_dropout", 0.0),
}
# Key → values that ask for nothing, and what to do instead.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "color_aug": ((False,), "colours are trained as they are; take it out"),
    "face_crop_aug_range": ((), "cut faces out beforehand, or take it out"),
    "secondary_separator": (("",), "join such tags by spaces, or take it out"),
    "token_warmup_step": ((0,), "take it out"),
    "caption_dropout_every_n_epochs": ((0,), "use caption_dropout_rate"),
    "custom_attributes": (({},), "it is for scripts of your own; take it out"),
    "resize_interpolation": (("lanczos",), "pictures are resized by Lanczos' filter; take it out"),
    "skip_image_resolution": ((), "move small pictures elsewhere, or take it out"),
    "network_multiplier": ((1,), "set loss_weight of sources in the recipe"),
    "validation_split": ((0,), "hold pictures out with validation.held_out of the recipe"),
    "conditioning_data_dir": ((), "ControlNet is not trained here"),
}
# They change nothing that is learned: a cache of sizes, and details of what is refused above.
_WITHOUT_EFFECT = ("cache_info", "token_warmup_min", "validation_seed")
_READ_BY_NAME = ("image_dir", "metadata_file", "alpha_mask", "caption_prefix", "caption_suffix")
_SIZES = ("resolution", "enable_bucket", *BUCKET_FIELDS)
FOLLOWED = {*_SOURCE_FIELDS, *_CAPTION_FIELDS, *_DATA_FIELDS, *_UNSUPPORTED, *_WITHOUT_EFFECT, *_READ_BY_NAME, *_SIZES}
"""Every key that is honoured, refused, or has no effect here: all that a file may have."""


def expand_sources(data: DataSection, folder: Path) -> DataSection:
    """The data section with one source for each subset of every data-set TOML among its sources.

    `[general]`, `[[datasets]]` and subsets are read as sd-scripts does. Settings that are the whole data set's here
    (batch size, buckets, flips) fill fields of `data` that the recipe does not set, and must agree with those it
    does; so does the first resolution, and subsets of another get their own. Relative paths are relative to the TOML's
    folder, or for the TOML itself to `folder`.
    Raises RecipeError that names every key that cannot be followed. Without a TOML, `data` itself is returned.
    """
    files = {index: absolute(s.path, folder) for index, s in enumerate(data.sources) if is_toml(s)}
    if not files:
        return data
    read = {index: read_subsets(file) for index, file in files.items()}
    subsets = [subset for part in read.values() for subset in part]
    problems = [problem for index in files for problem in _problems_of(data.sources[index], index, read[index])]
    problems += [*_disagreements(subsets, data), *size_problems(subsets, data)]
    if problems:
        raise recipe_error(" and ".join(map(str, files.values())), problems)
    sources: list[dict[str, Any]] = []
    for index, source in enumerate(data.sources):
        if index in files:
            shared = shared_resolution(subsets, data)
            sources += [_source(subset, data, files[index].parent, shared) for subset in read[index]]
        else:
            sources.append(source.model_dump(exclude_unset=True))
    filled = {**_data_fields(subsets), **size_fields(subsets, data), "sources": sources}
    try:
        return DataSection.model_validate({**data.model_dump(exclude_unset=True), **filled})
    except ValidationError as error:
        raise recipe_error("data, with what the data-set TOML says", problems_in(error)) from error


def _source(subset: Subset, data: DataSection, folder: Path, shared: int) -> dict[str, Any]:
    """The subset as a source; `shared`: the resolution of `data`."""
    keys, own = subset.keys, own_resolution(subset, shared)
    source = {field: keys[key] for key, field in _SOURCE_FIELDS.items() if key in keys}
    # sd-scripts takes what lies in image_dir itself, and no repeats from its name.
    source |= {"path": str(absolute(keys["image_dir"], folder)), "layout": "plain", "nested": False}
    if "metadata_file" in keys:
        source["metadata_file"] = str(absolute(keys["metadata_file"], folder))
    if keys.get("alpha_mask"):
        source["alpha"] = "mask"
    if own is not None:
        source["resolution"] = own
    return {**source, "captions": _caption_rules(keys, data)}


def _caption_rules(keys: Mapping[str, Any], data: DataSection) -> dict[str, Any]:
    """The recipe's own rules, and over them what the TOML says."""
    own = data.captions.model_dump(exclude_unset=True, exclude={"long"})
    # Of several lines sd-scripts takes the first, or with wildcards one at random.
    lines = {"lines": True, "choose": "random" if keys.get("enable_wildcard") else "first"}
    told = {field: keys[key] for key, field in _CAPTION_FIELDS.items() if key in keys}
    rules: dict[str, Any] = {**lines, **own, **told}
    if keys.get("is_reg"):
        rules["trigger"] = False
    prefix, suffix = keys.get("caption_prefix", ""), keys.get("caption_suffix", "")
    if not any(rules.get(field) for field in ("shuffle", "tag_dropout", "keep_separator")):
        return rules | {name: text for name, text in (("prefix", prefix), ("suffix", suffix)) if text}
    # Their tags are shuffled, kept and dropped with the caption's, so they must be there before.
    added = {r"re:\A": f"{prefix} "} if prefix else {}
    added |= {r"re:\Z": f" {suffix}"} if suffix else {}
    escaped = {find: put.replace("\\", "\\\\") for find, put in added.items()}
    return {**rules, "replace": {**rules.get("replace", {}), **escaped}} if escaped else rules


def _problems_of(source: SourceSection, index: int, subsets: Sequence[Subset]) -> Iterator[Problem]:
    """What is wrong with one TOML by itself."""
    others = sorted(source.model_fields_set - {"path"})
    if others:
        said = f"data.sources.{index} also sets {', '.join(others)}; the TOML is read as it is. Set them in the TOML."
        yield Problem((), said)
    yield from _problems(subsets)


def _problems(subsets: Sequence[Subset]) -> Iterator[Problem]:
    """What cannot be followed in single subsets."""
    seen: dict[object, Subset] = {}
    for subset in subsets:
        keys = subset.keys
        if "image_dir" not in keys:
            yield Problem((*subset.path, "image_dir"), "needed, but not given: the folder of the pictures.")
        for key, (harmless, instead) in _UNSUPPORTED.items():
            if key in keys and keys[key] not in harmless:
                yield Problem((*subset.path, key), f"{key} = {shown(keys[key])} is not supported: {instead}.")
        same = (subset.path[1], keys.get("image_dir"), keys.get("metadata_file"))
        if same in seen:
            first = ".".join(map(str, seen[same].path))
            said = f"the same pictures as {first}, which sd-scripts would ignore here; take one out."
            yield Problem(subset.path, said)
        seen.setdefault(same, subset)


def _disagreements(subsets: Sequence[Subset], data: DataSection) -> Iterator[Problem]:
    """Settings that are the whole data set's here, but not the same everywhere."""
    for key, (field, default) in _DATA_FIELDS.items():
        values = [_as_field(key, subset.keys.get(key, default)) for subset in subsets]
        if not any(key in subset.keys for subset in subsets):
            continue
        if any(value != values[0] for value in values):
            said = f"{key} differs between subsets; data.{field} is one for all. Make it the same."
            more = " train.micro_batch_size bounds memory." if key == "batch_size" else ""
            yield Problem((), said + more)
        elif field in data.model_fields_set and getattr(data, field) != values[0]:
            known = shown(getattr(data, field))
            said = f"{key} means data.{field}: {shown(values[0])}, but the recipe has {known}. Change one of them."
            yield Problem((), said)


def _data_fields(subsets: Sequence[Subset]) -> dict[str, Any]:
    """What the TOML says of fields of `data`, once no disagreement is left."""
    set_keys = {key for subset in subsets for key in subset.keys}
    return {
        field: _as_field(key, subsets[0].keys.get(key, default))
        for key, (field, default) in _DATA_FIELDS.items()
        if key in set_keys
    }


def _as_field(key: str, value: Any) -> Any:
    """The key's value as the field of `data` has it."""
    if key == "random_crop":
        return "random" if value else "center"
    return value
