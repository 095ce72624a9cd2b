"""Rows of metadata.jsonl, metadata.csv and metadata.parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from lora_kit.data.records import Flaw
from lora_kit.errors import DataError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class Row(NamedTuple):
    """One row."""

    id: str
    """`set/metadata.jsonl line 3`, for messages."""
    cells: Mapping[str, object]


class Table(NamedTuple):
    """A metadata file."""

    columns: set[str]
    rows: list[Row]


def read_table(path: Path, name: str, wanted: Collection[str], flaws: list[Flaw]) -> Table:
    """All rows of a metadata file, called `name` in messages; rows that cannot be read are added to `flaws`.

    wanted: the columns that will be looked at; of a parquet file no others are read.
    Raises DataError if the file as a whole cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".csv", ".parquet"):
        raise DataError(f"{path} is no metadata file: its name ends in {suffix or 'nothing'}, not .jsonl or .csv.")
    if suffix == ".parquet":
        return _parquet_table(path, name, wanted)
    return _text_table(path, name, flaws)


def _parquet_table(path: Path, name: str, wanted: Collection[str]) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns: set[str] = set(file.schema_arrow.names)
            cells: list[dict[str, object]] = file.read(columns=[*columns & set(wanted)]).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return Table(columns, [Row(f"{name} row {number}", row) for number, row in enumerate(cells)])


def _text_table(path: Path, name: str, flaws: list[Flaw]) -> Table:
    parse = _json_rows if path.suffix.lower() == ".jsonl" else _csv_rows
    rows: list[Row] = []
    try:
        # newline="": the csv module must see line breaks within quotes as they are.
        with path.open(encoding="utf-8-sig", newline="" if parse is _csv_rows else None) as file:
            for line, cells in parse(file):
                row_id = f"{name} line {line}"
                if isinstance(cells, str):
                    flaws.append(Flaw(row_id, cells))
                else:
                    rows.append(Row(row_id, cells))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return Table({column for row in rows for column in row.cells}, rows)


def _json_rows(file: TextIO) -> Iterator[tuple[int, dict[str, object] | str]]:
    """(line, cells or what is wrong). Lines end at line feeds alone: U+2028 may stand in a caption."""
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            value: Any = json.loads(text)
        except json.JSONDecodeError as error:
            yield line, f"not JSON ({error.msg} at column {error.colno})"
            continue
        yield line, value if isinstance(value, dict) else "not a JSON object"


def _csv_rows(file: TextIO) -> Iterator[tuple[int, dict[str, object] | str]]:
    reader = csv.reader(file, strict=True)
    header = next(reader, list[str]())
    for fields in reader:
        if not fields:
            continue
        if len(fields) != len(header):
            fix = " Put quotes around captions with commas." if len(fields) > len(header) else ""
            yield reader.line_num, f"{len(fields)} fields where the header has {len(header)}.{fix}"
            continue
        yield reader.line_num, dict(zip(header, fields, strict=True))
