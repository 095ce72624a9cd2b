"""The keys of sd-scripts' data-set TOML (`--dataset_config`), as its docs/config_README gives them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError

from lora_kit.errors import RecipeError, did_you_mean
from lora_kit.recipe.base import Fraction, NonNegative, Positive, Problem, Section
from lora_kit.recipe.messages import problems_in, recipe_error
from lora_kit.recipe.sources import SourceSection

Pair = Annotated[list[Positive], Field(min_length=2, max_length=2)]


class _AnywhereKeys(Section):
    """Allowed in `[general]`, `[[datasets]]` and `[[datasets.subsets]]`; the innermost counts."""

    num_repeats: Positive | None = None
    shuffle_caption: bool | None = None
    keep_tokens: NonNegative | None = None
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    caption_separator: str | None = None
    enable_wildcard: bool | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: Fraction | None = None
    caption_tag_dropout_rate: Fraction | None = None
    caption_dropout_every_n_epochs: NonNegative | None = None
    token_warmup_min: NonNegative | None = None
    token_warmup_step: float | None = None
    caption_extension: str | None = None
    class_tokens: str | None = None
    cache_info: bool | None = None
    color_aug: bool | None = None
    flip_aug: bool | None = None
    face_crop_aug_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    random_crop: bool | None = None
    resize_interpolation: str | None = None
    custom_attributes: dict[str, Any] | None = None


class _DatasetKeys(_AnywhereKeys):
    """Also allowed in `[general]` and `[[datasets]]`: what the subsets of a data set share."""

    batch_size: Positive | None = None
    resolution: Positive | Pair | None = None
    enable_bucket: bool | None = None
    min_bucket_reso: Positive | None = None
    max_bucket_reso: Positive | None = None
    bucket_reso_steps: Positive | None = None
    bucket_no_upscale: bool | None = None
    skip_image_resolution: Positive | Pair | None = None
    network_multiplier: float | None = None
    validation_seed: int | None = None
    validation_split: Fraction | None = None


class _SubsetKeys(_AnywhereKeys):
    image_dir: str | None = None
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
    is_reg: bool | None = None
    alpha_mask: bool | None = None


class _Dataset(_DatasetKeys):
    subsets: Annotated[list[_SubsetKeys], Field(min_length=1)]


class _File(Section):
    general: _DatasetKeys = _DatasetKeys()
    datasets: Annotated[list[_Dataset], Field(min_length=1)]


KEYS = frozenset({*_DatasetKeys.model_fields, *_SubsetKeys.model_fields})
"""All keys, wherever they are allowed."""


class Subset(NamedTuple):
    """One `[[datasets.subsets]]` with what it takes from its data set and from `[general]`."""

    path: tuple[str | int, ...]
    """`datasets.0.subsets.1`, for messages."""
    keys: dict[str, Any]
    """The keys that are set for it."""


def is_toml(source: SourceSection) -> bool:
    """Whether a source is a data-set TOML."""
    return source.path.lower().endswith(".toml")


def read_subsets(file: Path) -> list[Subset]:
    """The subsets of a data-set TOML. Raises RecipeError that lists every unknown key and wrong value at once."""
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read as a data-set TOML: {error}.") from error
    try:
        whole = _File.model_validate(tree)
    except ValidationError as error:
        raise recipe_error(str(file), list(_problems(error))) from error
    return list(_subsets(whole))


def _subsets(file: _File) -> Iterator[Subset]:
    for number, dataset in enumerate(file.datasets):
        for index, subset in enumerate(dataset.subsets):
            shared = {**_set_keys(file.general), **_set_keys(dataset)}
            yield Subset(("datasets", number, "subsets", index), {**shared, **_set_keys(subset)})


def _set_keys(section: Section) -> dict[str, Any]:
    return section.model_dump(exclude_unset=True, exclude={"subsets"})


def _problems(error: ValidationError) -> Iterator[Problem]:
    for details, problem in zip(error.errors(include_url=False), problems_in(error), strict=True):
        if details["type"] != "extra_forbidden":
            # pydantic names the kind of each alternative that did not fit; the file has no such key.
            yield Problem(tuple(part for part in problem.path if part not in _ALTERNATIVES), problem.message)
            continue
        where = "subset" if "subsets" in problem.path[:-1] else "data set" if "datasets" in problem.path else "general"
        allowed = {"subset": _SubsetKeys, "data set": _Dataset, "general": _DatasetKeys}[where].model_fields
        key = str(problem.path[-1])
        elsewhere = " It belongs to another place of the file." if key in KEYS else did_you_mean(key, allowed)
        yield Problem(problem.path, f"unknown key here.{elsewhere}")


_ALTERNATIVES = ("constrained-int", "constrained-list", "int", "list[constrained-int]")
