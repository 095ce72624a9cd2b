"""Which rows of which stored tensor are a module's weight or bias, told by names and shapes alone.

No network is built and neither diffusers nor transformers is imported: that takes longer than the merge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lora_kit.merging.stored import StoredTensor, WeightFile
from lora_kit.models.single_file.ldm_keys import CLIP, OPEN_CLIP, UNET, claim, structure
from lora_kit.targeting.modules import ModuleInfo

_PROJECTIONS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(rf"(\.attentions\.\d+\.)({'|'.join(_PROJECTIONS)})(?=\.(?:weight|bias)$)")
_EMBEDDINGS = ("token_embedding", "position_embedding")


class Place(NamedTuple):
    """Where a module's parameter lies: rows `start` to `stop` of `key`, which is all of it but for packed tensors."""

    file: int
    """Index into the base's files."""
    key: str
    start: int
    stop: int


class Places(NamedTuple):
    """The modules of a base, as its files hold them."""

    modules: dict[str, ModuleInfo]
    """Dotted name → module; the text encoder's without `text_model`."""
    weights: dict[str, Place]
    biases: dict[str, Place]
    components: dict[tuple[int, str], str]
    """(file, key) → component, for every tensor that belongs to one."""


class _Row(NamedTuple):
    file: int
    tensor: StoredTensor
    component: str
    names: tuple[str, ...]
    """Names in the component's state dict; several for a tensor that packs them one below the other."""


def folder_places(files: Mapping[str, Sequence[WeightFile]]) -> Places:
    """Of a diffusers folder: component → its files (one or more shards), numbered through in this order."""
    placed = [(component, file) for component, shards in files.items() for file in shards]
    rows = [
        _Row(number, tensor, component, (_own_name(tensor.key),))
        for number, (component, file) in enumerate(placed)
        for tensor in file.tensors.values()
    ]
    return _places(rows)


def _own_name(key: str) -> str:
    """A tensor's name in the network as the libraries build it now.

    transformers 5.6 dropped CLIPTextModel's inner `text_model.`. Old files, such as those of the original
    latent-diffusion models, name the projections of attention blocks that see no text otherwise; diffusers renames
    them when it loads.
    """
    renamed = _OLD_ATTENTION.sub(lambda found: found[1] + _PROJECTIONS[found[2]], key)
    return renamed.removeprefix("text_model.")


def checkpoint_places(file: WeightFile) -> Places:
    """Of a single-file checkpoint in the LDM layout: UNet and text encoder. SD2's OpenCLIP packs q, k and v.

    Tensors of a component that no network uses (OpenCLIP's last layer, `attn_mask`) belong to it, but to no module.
    """
    form = structure(file.tensors)
    claims = {key: claim(key, form) for key in file.tensors}
    rows = [
        _Row(0, file.tensors[key], found.component, found.names)
        for key, found in claims.items()
        if found is not None and found.component != "vae"
    ]
    prefixes = {"unet": UNET, "text_encoder": (CLIP, OPEN_CLIP)}
    owners = {(0, key): name for name, prefix in prefixes.items() for key in file.tensors if key.startswith(prefix)}
    return _places(rows)._replace(components=owners)


def _places(rows: Sequence[_Row]) -> Places:
    weights: dict[str, tuple[Place, tuple[int, ...]]] = {}
    biases: dict[str, tuple[Place, tuple[int, ...]]] = {}
    for row in rows:
        for name, place, shape in _parts(row):
            module, _, kind = name.rpartition(".")
            table = {"weight": weights, "bias": biases}.get(kind)
            if table is not None:
                table[f"{row.component}.{module}"] = (place, shape)
    bias_sizes = {name: place.stop - place.start for name, (place, _) in biases.items()}
    modules = {name: _module(name, shape, bias_sizes.get(name, 0)) for name, (_, shape) in weights.items()}
    return Places(
        modules,
        {name: place for name, (place, _) in weights.items()},
        {name: place for name, (place, _) in biases.items()},
        {(row.file, row.tensor.key): row.component for row in rows},
    )


def _parts(row: _Row) -> Iterator[tuple[str, Place, tuple[int, ...]]]:
    """(state dict name, place, shape) of each parameter that the tensor holds."""
    shape = row.tensor.shape
    count = shape[0] // len(row.names) if shape else 0
    for index, name in enumerate(row.names):
        place = Place(row.file, row.tensor.key, index * count, (index + 1) * count)
        yield name, place, (count, *shape[1:])


def _module(name: str, shape: tuple[int, ...], bias: int) -> ModuleInfo:
    plain = {2: "linear", 4: "conv"}.get(len(shape), "other")
    kind = "other" if name.endswith(_EMBEDDINGS) else plain
    size = 1
    for side in shape:
        size *= side
    return ModuleInfo(name, kind, shape, size + bias)
