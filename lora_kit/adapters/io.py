"""Read an adapter file of any known layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from lora_kit.adapters.formats.container import open_safetensors
from lora_kit.adapters.formats.fit import Split, fit, split
from lora_kit.adapters.formats.layout import Layout
from lora_kit.adapters.formats.recognise import recognise
from lora_kit.adapters.state import AdapterState, weight_modules


class RawAdapter(NamedTuple):
    """A file as it is, before it is held against a model."""

    layout: Layout
    parts: Split
    metadata: dict[str, str]


def read_raw(path: Path) -> RawAdapter:
    """A file's updates under the file's own module spellings, for looking at it without a model.

    Raises AdapterFileError for a file that is damaged or of a layout that cannot be read.
    """
    with open_safetensors(path) as file:
        layout = recognise(path, [entry.name for entry in file.header.entries])  # before gigabytes are read
        tensors = file.tensors()
    metadata = file.header.metadata
    return RawAdapter(layout, split(layout, tensors, metadata), metadata)


def read_adapter(path: Path, components: Mapping[str, nn.Module]) -> AdapterState:
    """The adapter under the dotted names of `components` (which may lie on the meta device), fp32 on the CPU.

    Raises one AdapterFileError with everything that does not fit: unknown keys, missing halves, wrong shapes,
    NaN or infinite values. Never returns part of a file.
    """
    layout, parts, metadata = read_raw(path)
    return AdapterState(fit(path, layout, parts, weight_modules(components)), metadata)
