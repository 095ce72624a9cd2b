"""The base of a merge, opened: its weight files, and which of their rows are which module's."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lora_kit.errors import ModelError, RecipeError
from lora_kit.merging.places import Places, checkpoint_places, folder_places
from lora_kit.merging.stored import WeightFile, open_weights
from lora_kit.merging.weights import ComponentFiles, component_files
from lora_kit.models.family.family_names import PIPELINE_FAMILIES
from lora_kit.models.pipeline_index import check_index, index_in, read_index
from lora_kit.models.single_file.checkpoint_file import SUFFIXES
from lora_kit.models.single_file.ldm_configs import is_v2
from lora_kit.models.single_file.ldm_marks import recognise
from lora_kit.models.tree_family import family_of_tree

COMPONENTS = ("unet", "text_encoder")


class Base(NamedTuple):
    """A diffusers folder or a single-file checkpoint; nothing of its weights is read yet."""

    path: Path
    files: tuple[WeightFile, ...]
    places: Places
    components: dict[str, ComponentFiles]
    """Of a folder; empty for a single file."""
    named_family: str | None = None
    """The family that the pipeline's class tells; None: the weights tell."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a diffusers folder."""
        return bool(self.components)

    @property
    def family(self) -> str | None:
        """The pipeline's, else `sd1`, `sd2` …, by the modules; None for a network of no known family."""
        found = self.named_family or family_of_tree(self.places.modules)
        if found and not self.is_folder and is_v2({key: one.shape for key, one in self.files[0].tensors.items()}):
            return found.replace("sd1", "sd2")  # some hold its linear layers as convolutions
        return found

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
    index = read_index(index_in(folder))
    parts = check_index(index, str(folder))
    places = {name: folder / parts[name].folder for name in COMPONENTS if name in parts}
    found = {name: component_files(place) for name, place in places.items() if place.is_dir()}
    if "unet" not in found:
        raise ModelError(f"{folder} is incomplete: it has no folder unet. Fetch the base again.")
    shards = {name: tuple(map(open_weights, files.weights)) for name, files in found.items()}
    files = tuple(file for some in shards.values() for file in some)
    return Base(folder, files, folder_places(shards), found, PIPELINE_FAMILIES.get(index["_class_name"]))
