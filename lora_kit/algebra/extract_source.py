"""A base's UNet and text encoder, parameter by parameter under one set of names, whatever layout holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lora_kit.merging.base import open_base
from lora_kit.merging.places import Place


class Parameters(NamedTuple):
    """An open base. `read` gives views of the file's mapped pages: never write to them."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    """Dotted parameter name (`unet.conv_in.weight`; the text encoder's without `text_model.`) → shape."""
    read: Callable[[str], Tensor]
    family: str
    """`sd1` or `sd2` by the width of the text states; empty for others."""


def open_parameters(path: Path) -> Parameters:
    """Open a diffusers folder or a single-file checkpoint (LDM layout; .safetensors, .ckpt).

    Raises RecipeError where there is none, ModelError where it is damaged or no Stable Diffusion v1 or v2.
    """
    base = open_base(path)
    weights = {f"{module}.weight": place for module, place in base.places.weights.items()}
    places = weights | {f"{module}.bias": place for module, place in base.places.biases.items()}
    stored = {name: base.files[place.file].tensors[place.key].shape for name, place in places.items()}
    shapes = {name: _shape(stored[name], place) for name, place in places.items()}

    def read(name: str) -> Tensor:
        place = places[name]
        tensor = base.files[place.file].read(place.key)
        return tensor[place.start : place.stop] if tensor.ndim else tensor

    return Parameters(path, shapes, read, base.family or "")


def _shape(stored: tuple[int, ...], place: Place) -> tuple[int, ...]:
    return (place.stop - place.start, *stored[1:]) if stored else stored
