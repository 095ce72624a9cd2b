"""Read an adapter of any known layout: a file, or PEFT's folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

from lora_kit.adapters.formats import cloneofsimo, diffusers
from lora_kit.adapters.formats.bundled import take_bundled, without_bundled
from lora_kit.adapters.formats.cloneofsimo import CloneOfSimo
from lora_kit.adapters.formats.container import open_safetensors
from lora_kit.adapters.formats.diffusers import Diffusers
from lora_kit.adapters.formats.fit import Split, fit, split
from lora_kit.adapters.formats.layout import Key, Layout
from lora_kit.adapters.formats.peft import Peft, beside_config, is_peft_folder, read_peft_folder
from lora_kit.adapters.formats.peft_alphas import outputs_first
from lora_kit.adapters.formats.recognise import recognise
from lora_kit.adapters.state import AdapterState, adaptable_modules
from lora_kit.errors import AdapterFileError
from lora_kit.targeting import ModuleInfo

_SHOWN = 10
_INTEGERS = {"alpha", "on_input"}


class RawAdapter(NamedTuple):
    """A file as it is, before it is held against a model."""

    layout: Layout
    parts: Split
    metadata: dict[str, str]
    embeddings: Mapping[str, Tensor] = MappingProxyType({})
    """Learned tokens: what a prompt says → its vectors [width] or [n, width]."""


def read_raw(path: Path) -> RawAdapter:
    """A file's updates under the file's own module spellings, for looking at it without a model.

    Raises AdapterFileError for a file that is damaged or of a layout that cannot be read.
    """
    layout, tensors, metadata = _contents(path)
    if isinstance(layout, Diffusers | Peft):
        tensors = outputs_first(tensors)
    embeddings = take_bundled(path, tensors)
    _refuse_twice(path, layout, tensors)
    _refuse_integers(path, layout, tensors)
    if isinstance(layout, CloneOfSimo):
        embeddings |= {token: tensors.pop(token) for token in cloneofsimo.tokens(metadata, list(tensors))}
    return RawAdapter(layout, split(layout, tensors, metadata), metadata, embeddings)


def read_adapter(path: Path, components: Mapping[str, nn.Module]) -> AdapterState:
    """The adapter under the dotted names of `components` (which may lie on the meta device).

    Tensors keep the precision they are stored in; they lie on the CPU.

    Raises one AdapterFileError with everything that does not fit: unknown keys, missing halves, wrong shapes,
    NaN or infinite values. Never returns part of a file.
    """
    return fitted(path, read_raw(path), adaptable_modules(components))


def fitted(path: Path, raw: RawAdapter, modules: Mapping[str, ModuleInfo]) -> AdapterState:
    """`read_adapter` for a file that is read already, against a module tree. Raises AdapterFileError as it does."""
    updates = fit(path, raw.layout, raw.parts, modules)
    return AdapterState(updates, raw.metadata, raw.embeddings)


def _contents(path: Path) -> tuple[Layout, dict[str, Tensor], dict[str, str]]:
    if is_peft_folder(path):
        return read_peft_folder(path)
    if path.is_dir():
        raise AdapterFileError(
            f"{path}: a folder without adapter_config.json, nor unet/ or text_encoder/ that have one. "
            "An adapter is one .safetensors file, or a folder that PEFT saved."
        )
    with open_safetensors(path) as file:
        keys = [entry.name for entry in file.header.entries]
        metadata = file.header.metadata
        layout = _described(path, recognise(path, without_bundled(keys)), keys, metadata)  # before gigabytes are read
        return layout, file.tensors(), metadata


def _refuse_twice(path: Path, layout: Layout, keys: Collection[str]) -> None:
    """Two keys can be spellings of one part (`x.lora_A.weight`, `x.lora.down.weight`): neither may win silently."""
    seen: dict[Key, str] = {}
    problems: list[str] = []
    for key in keys:
        parsed = layout.parse(key)
        if parsed is not None and seen.setdefault(parsed, key) != key:
            problems.append(f"{seen[parsed]} and {key}")
    if problems:
        listed = "\n  ".join(problems[:_SHOWN])
        raise AdapterFileError(f"{path}: {len(problems)} parts are in the file twice, under two names:\n  {listed}")


def _refuse_integers(path: Path, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Alpha is an integer in some files; a factor that is one is quantised or damaged."""
    problems = [
        f"{key}: {tensor.dtype}"
        for key, tensor in tensors.items()
        if not tensor.is_floating_point() and (parsed := layout.parse(key)) is not None and parsed.part not in _INTEGERS
    ]
    if problems:
        listed = "\n  ".join(problems[:_SHOWN])
        raise AdapterFileError(f"{path}: {len(problems)} parts are integers, which no update is made of:\n  {listed}")


def _described(path: Path, layout: Layout, keys: Collection[str], metadata: Mapping[str, str]) -> Layout:
    """The layout's reader, told what the header (or the config beside the file) says of this file's keys."""
    if isinstance(layout, Diffusers):
        return diffusers.with_header(path, metadata)
    if isinstance(layout, CloneOfSimo):
        return cloneofsimo.with_header(path, keys, metadata)
    return beside_config(path) if isinstance(layout, Peft) else layout
