"""A base's UNet and text encoder, parameter by parameter under one set of names, whatever layout holds them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lora_kit.errors import ModelError
from lora_kit.merging.weights import component_files, read_weights
from lora_kit.models.checkpoint_file import SUFFIXES, CheckpointFile, open_checkpoint
from lora_kit.models.ldm_keys import Claim, claim, is_unused, structure

COMPONENTS = ("unet", "text_encoder")
_BUFFERS = ("position_ids",)  # of old text encoders: numbers 0 to 76, no parameter


class Parameters(NamedTuple):
    """An open base. Tensors lie on the file's mapped pages: `read` costs memory only where they are packed."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    """Dotted parameter name (`unet.conv_in.weight`; the text encoder's without `text_model.`) → shape."""
    read: Callable[[str], Tensor]


@contextmanager
def open_parameters(path: Path) -> Generator[Parameters]:
    """Open a diffusers folder or a single-file checkpoint (LDM layout; .safetensors, .ckpt).

    Raises ModelError where there is none, or it is damaged, or holds names that no Stable Diffusion network has.
    """
    if path.is_dir():
        yield _folder(path)
    elif path.is_file() and path.suffix in SUFFIXES:
        with open_checkpoint(path) as file:
            yield _single_file(file)
    else:
        what = f"a {path.suffix or 'nameless'} file" if path.is_file() else "no such file or folder"
        raise ModelError(f"{path}: {what}. Give a diffusers folder or a checkpoint ({', '.join(SUFFIXES)}).")


def _folder(path: Path) -> Parameters:
    present = [component for component in COMPONENTS if (path / component).is_dir()]
    if not present:
        raise ModelError(f"{path}: holds no folder {' or '.join(COMPONENTS)}, so it is not a diffusers pipeline")
    tensors: dict[str, Tensor] = {}
    for component in present:
        stored, _ = read_weights(component_files(path / component))
        tensors |= {f"{component}.{key.removeprefix('text_model.')}": tensor for key, tensor in stored.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if _is_parameter(name)}
    return Parameters(path, shapes, tensors.__getitem__)


def _single_file(file: CheckpointFile) -> Parameters:
    form = structure(file.shapes)
    claims = {key: claim(key, form) for key in file.shapes}
    unknown = [key for key, found in claims.items() if found is None and not is_unused(key, form)]
    if unknown or not form.unet_levels:
        got = f"it holds {_some(unknown)}" if unknown else "it has no UNet"
        raise ModelError(f"{file.path}: not a Stable Diffusion v1 or v2 checkpoint: {got}")
    places = {
        f"{found.component}.{name}": (key, found, index)
        for key, found in claims.items()
        if found is not None and found.component in COMPONENTS
        for index, name in enumerate(found.names)
    }
    shapes = {name: _part_shape(file.shapes[key], found) for name, (key, found, _) in places.items()}
    shapes = {name: shape for name, shape in shapes.items() if _is_parameter(name)}
    return Parameters(file.path, shapes, lambda name: _part(file, *places[name]))


def _part(file: CheckpointFile, key: str, found: Claim, index: int) -> Tensor:
    tensor = file.read(key)
    return tensor if len(found.names) == 1 else tensor.chunk(len(found.names))[index]


def _part_shape(shape: tuple[int, ...], found: Claim) -> tuple[int, ...]:
    count = len(found.names)
    return shape if count == 1 else (shape[0] // count, *shape[1:])


def _is_parameter(name: str) -> bool:
    return not name.endswith(_BUFFERS)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
