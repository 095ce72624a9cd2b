"""Read an adapter file of any known layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_kit.adapters.formats.container import read_safetensors
from lora_kit.adapters.formats.fit import Split, fit, split
from lora_kit.adapters.formats.layout import Layout
from lora_kit.adapters.formats.recognise import recognise
from lora_kit.adapters.state import AdapterState, adaptable_modules
from lora_kit.targeting.modules import ModuleInfo

if TYPE_CHECKING:
    from torch import nn


class RawAdapter(NamedTuple):
    """A file as it is, before it is held against a model."""

    layout: Layout
    parts: Split
    metadata: dict[str, str]


def read_raw(path: Path) -> RawAdapter:
    """A file's updates under the file's own module spellings, for looking at it without a model.

    Raises AdapterFileError for a file that is damaged or of a layout that cannot be read.
    """
    tensors, metadata = read_safetensors(path)
    layout = recognise(path, tensors.keys())
    return RawAdapter(layout, split(layout, tensors, metadata), metadata)


def read_adapter(path: Path, components: Mapping[str, nn.Module]) -> AdapterState:
    """The adapter under the dotted names of `components` (which may lie on the meta device).

    Tensors keep the precision they are stored in; they lie on the CPU.

    Raises one AdapterFileError with everything that does not fit: unknown keys, missing halves, wrong shapes,
    NaN or infinite values. Never returns part of a file.
    """
    return fit_adapter(path, adaptable_modules(components))


def fit_adapter(path: Path, modules: Mapping[str, ModuleInfo]) -> AdapterState:
    """As `read_adapter`, for a model of which only the modules are known."""
    layout, parts, metadata = read_raw(path)
    return AdapterState(fit(path, layout, parts, modules), metadata)
