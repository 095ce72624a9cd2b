"""Reading the encoders of a base again, bit for bit, after their weights were given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from lora_kit.allocator import pages_of_their_own
from lora_kit.errors import ModelError
from lora_kit.models.attention import use_attention
from lora_kit.models.loading import TINY, TINY_FOLDER, fresh_text_encoder, open_layout
from lora_kit.recipe.sections import ModelSection


class Recall:
    """Reads the encoders of a base again as `load_bundle` read them."""

    def __init__(self, section: ModelSection, dtype: torch.dtype, vae_dtype: torch.dtype, seed: int) -> None:
        """As `load_bundle`'s, and made when that is done: the files must stay as they are now."""
        self._section, self._dtypes, self._seed = section, (dtype, vae_dtype), seed
        self._place = _local_place(section)
        self._files = _files(self._place) if self._place is not None else {}

    @property
    def can(self) -> bool:
        """Whether the base's files are all on this machine."""
        return self._place is not None

    @pages_of_their_own()
    def __call__(self, name: str) -> nn.Module:
        """The network (`vae`, `text_encoder`), on the CPU. Raises ModelError if the files are no longer those it was
        read from."""
        assert self._place is not None, "nothing is given back that cannot be read again"
        if _files(self._place) != self._files:
            raise ModelError(
                f"{self._section.base}: its files were changed or moved since the run began, and the {name} is needed "
                "again. Put them back and resume the run, or begin a new one with the new files."
            )
        section = self._section.model_copy(update={"base": str(self._place)})
        with open_layout(section) as layout:
            if name == "vae":
                network: Any = layout.vae(self._dtypes[1])
                use_attention(section.attention, network)
            elif section.weights == "fresh":
                network = fresh_text_encoder(layout.configs(), self._dtypes[0], self._seed)
            else:
                network = layout.text_encoder(self._dtypes[0])
        return network.eval().requires_grad_(False)


def _local_place(section: ModelSection) -> Path | None:
    """The folder or file that the base was read from; None where it is not on this machine as a whole."""
    if section.base == TINY:
        return TINY_FOLDER
    path = Path(section.base).expanduser()
    if path.exists():
        return path.absolute()
    try:
        return Path(snapshot_download(section.base, revision=section.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _files(place: Path) -> dict[str, tuple[int, int]]:
    """Name → size and time of change in ns, of every file of the base."""
    paths = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    found = {str(path): path.stat() for path in paths if path.exists()}
    return {name: (facts.st_size, facts.st_mtime_ns) for name, facts in found.items()}
