"""The base of a merge, opened: its weight files, and which of their rows are which module's."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lora_kit.errors import ModelError, RecipeError
from lora_kit.merging.places import Places, checkpoint_places, folder_places
from lora_kit.merging.stored import WeightFile, open_weights
from lora_kit.merging.weights import ComponentFiles, component_files
from lora_kit.models.checkpoint_file import SUFFIXES
from lora_kit.models.ldm_configs import is_v2
from lora_kit.models.ldm_marks import recognise
from lora_kit.models.pipeline_index import check_index, index_in, read_index
from lora_kit.models.tree_family import family_of_tree

COMPONENTS = ("unet", "text_encoder")


class Base(NamedTuple):
    """A diffusers folder or a single-file checkpoint; nothing of its weights is read yet."""

    path: Path
    files: tuple[WeightFile, ...]
    places: Places
    components: dict[str, ComponentFiles]
    """Of a folder; empty for a single file."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a diffusers folder."""
        return bool(self.components)

    @property
    def family(self) -> str | None:
        """`sd1`, `sd2` …, by the modules; None for a network of no known family."""
        if not self.is_folder and is_v2({key: tensor.shape for key, tensor in self.files[0].tensors.items()}):
            return "sd2"  # some hold its linear layers as convolutions
        return family_of_tree(self.places.modules)

    def component_of(self, file: int, key: str) -> str | None:
        """`unet`, `text_encoder`, or None for a tensor of neither."""
        return self.places.components.get((file, key))


def open_base(path: Path) -> Base:
    """Open a base by its headers.

    Raises RecipeError if there is nothing at `path`, and ModelError if what is there is no base of Stable Diffusion
    v1 or v2, or is damaged.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise RecipeError(
            f"{path}: does not exist; the base of a merge is a diffusers folder, a .safetensors or .ckpt file, or "
            "`tiny`"
        )
    if path.suffix not in SUFFIXES:
        raise ModelError(f"{path} is a {path.suffix or 'nameless'} file; a base is {', '.join(SUFFIXES)}.")
    file = open_weights(path)
    recognise(path, file.tensors, ("UNet",))
    return Base(path, (file,), checkpoint_places(file), {})


def _open_folder(folder: Path) -> Base:
    check_index(read_index(index_in(folder)), str(folder))
    found = {name: component_files(folder / name) for name in COMPONENTS if (folder / name).is_dir()}
    if "unet" not in found:
        raise ModelError(f"{folder} is incomplete: it has no folder unet. Fetch the base again.")
    shards = {name: tuple(map(open_weights, files.weights)) for name, files in found.items()}
    return Base(folder, tuple(file for files in shards.values() for file in files), folder_places(shards), found)
