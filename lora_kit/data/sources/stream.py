"""The beginning of a data set that is too large to fetch: streamed once, kept in the cache of HF `datasets`.

Training takes pictures in any order, each epoch in another, and goes on after a stop at the very next one. A stream can
do none of this, so what is streamed is bounded (`max_records`) and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import UnidentifiedImageError

from lora_kit.data.sources.cells import picture_path
from lora_kit.data.sources.filters import require_column
from lora_kit.data.sources.source import Place

if TYPE_CHECKING:
    from datasets import Dataset, Features


def read_stream(place: Place, name: str, files: Mapping[str, str] | None) -> Dataset:
    """The first `max_records` rows: the picture's, the caption's and `where`'s columns, pictures as bytes.

    name, files: what `datasets.load_dataset` takes. A second call reads the cache, unless the data set has changed.
    Raises DataError for a missing column; ValueError, OSError and DatasetsError if it cannot be read.
    """
    import datasets

    section = place.section
    builder = datasets.load_dataset_builder(name, section.config, data_files=files)
    stream = builder.as_streaming_dataset(split=section.split)
    assert isinstance(stream, datasets.IterableDataset)  # one split was named
    columns = _columns(place, stream.features or _features_of(next(iter(stream), {})))
    limit = section.max_records
    # The builder's folder in the cache names the data set, its configuration and its version.
    key = (str(builder.cache_dir), section.split, section.image_column, sorted(columns), limit)
    pictures = [column for column in (section.image_column, section.mask_column) if column is not None]
    for column in pictures:
        if isinstance(columns[column], datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    folder = place.path if place.path is None or place.path.is_dir() else place.path.parent

    def rows() -> Iterator[dict[str, Any]]:
        for row in islice(stream, limit):
            held = {column: _embedded(row[column], folder) for column in pictures}
            yield {**{column: row[column] for column in columns}, **held}

    loaded = datasets.Dataset.from_generator(
        rows,
        features=datasets.Features({**columns, **{column: datasets.Image() for column in pictures}}),
        fingerprint=hashlib.sha256(repr(key).encode()).hexdigest()[:32],
    )
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def _columns(place: Place, features: Features) -> dict[str, Any]:
    """The columns that are needed, each with its type."""
    section = place.section
    asked = {"image_column": section.image_column, "caption_column": section.caption_column}
    if section.mask_column is not None:
        asked["mask_column"] = section.mask_column
    wanted = [*((column, field) for field, column in asked.items()), *((column, "where") for column in section.where)]
    for column, field in wanted:
        require_column(column, features, place.origin, field)
    return {column: features[column] for column, _ in wanted}


def _features_of(row: Mapping[str, Any]) -> Features:
    """Types as Arrow takes them from one row, where the data set names none."""
    import datasets
    import pyarrow

    return datasets.Features.from_arrow_schema(pyarrow.Table.from_pylist([row]).schema)


def _embedded(cell: Any, folder: Path | None) -> dict[str, object]:
    """The picture's bytes, fetched if only its path is there. What may not be read stays a path, and is refused when
    the picture is opened."""
    held = cell if isinstance(cell, Mapping) else {"bytes": cell if isinstance(cell, bytes) else None, "path": cell}
    path = held.get("path")
    if held.get("bytes") is not None or not isinstance(path, str):
        return {"bytes": held.get("bytes"), "path": None}
    if "://" in path:
        import fsspec

        with fsspec.open(path, "rb") as file:
            content: bytes = file.read()  # pyright: ignore[reportAttributeAccessIssue] (stub: a list of files)
        return {"bytes": content, "path": None}
    try:
        return {"bytes": picture_path(path, folder).read_bytes(), "path": None}
    except UnidentifiedImageError:
        return {"bytes": None, "path": path}
