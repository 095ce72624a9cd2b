"""Reading what the cache holds while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lora_kit.data.cache.keys import KEY_BYTES
from lora_kit.data.cache.store import CacheStore
from lora_kit.data.samples import Latent


class DiskLatents:
    """The latents of each place of a training set. Can be pickled; 32 bytes a view in memory, whatever its size."""

    in_memory = False

    def __init__(self, store: CacheStore, keys: Sequence[Sequence[bytes]]) -> None:
        """Keys: of each place, the picture's and, where pictures are flipped, its mirror image's."""
        self.store = store
        self.versions = len(keys[0])
        self._keys = b"".join(key for versions in keys for key in versions)

    def __len__(self) -> int:
        """Places."""
        return len(self._keys) // (KEY_BYTES * self.versions)

    def read(self, place: int, mirrored: bool = False) -> Latent | None:
        """The latents at a place, or None if the entry was damaged, or pruned, since the cache was filled."""
        begin = (place * self.versions + mirrored) * KEY_BYTES
        tensors = self.store.get(self._keys[begin : begin + KEY_BYTES])
        if tensors is None:
            return None
        mask = tensors.get("mask")
        return Latent(tensors["mean"].float(), tensors["std"].float(), None if mask is None else mask.float())


class DiskTexts:
    """Captions' states from the cache."""

    def __init__(self, store: CacheStore, keys: Mapping[str, bytes]) -> None:
        """Keys: of each caption that is kept."""
        self.store = store
        self.keys = keys

    def __len__(self) -> int:
        """Captions."""
        return len(self.keys)

    def read(self, caption: str) -> Tensor | None:
        """The states [tokens, width] in the dtype the encoder gave, or None if they are not there."""
        key = self.keys.get(caption)
        tensors = self.store.get(key) if key else None
        return tensors["states"] if tensors else None
