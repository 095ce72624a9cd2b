"""Order and chance as pure functions of (seed, epoch, sample): nothing to save, the same in every process."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_MANTISSA = 1 << 53


class Chances(NamedTuple):
    """Independent uniform draws in [0, 1) for one sample. Each has its use, so turning one on moves no other."""

    flip: float
    caption: float
    across: float
    down: float


@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, count: int, use: str = "order") -> NDArray[np.int64]:
    """The order of `count` samples (or what else `use` names) in an epoch, int64 [count], read-only.

    Sorts raw Philox words (Salmon et al. 2011): NumPy promises those for all versions and platforms, which it
    does not for `Generator.permutation` (NEP 19), nor PyTorch for `randperm`.
    """
    words = np.random.Philox(key=int.from_bytes(_digest(16, use, seed, epoch), "big")).random_raw(count)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def chances(seed: int, epoch: int, sample: int) -> Chances:
    """The draws of the sample with this number within the epoch's unshuffled list."""
    digest = _digest(32, "sample", seed, epoch, sample)
    words = (int.from_bytes(digest[start : start + 8], "big") >> 11 for start in range(0, 32, 8))
    return Chances(*(word / _MANTISSA for word in words))


def _digest(size: int, *words: int | str) -> bytes:
    return hashlib.blake2b("\x1f".join(map(str, words)).encode(), digest_size=size).digest()
