"""Bytes of tensors that live at once, counted as torch makes and frees them: of real tensors, or of fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Scratch = Callable[[Any, Sequence[Any], Any], int]


class LiveBytes(TorchDispatchMode):
    """While inside, every storage that an operation makes counts from then on until it is freed.

    What a kernel takes and frees within one operation is not seen; `scratch` reckons it.
    """

    def __init__(self, known: Iterable[Tensor] = (), scratch: Scratch | None = None) -> None:
        """known: what is there already, and does not count (weights). scratch: of an operation, its arguments and
        what it made → bytes that it needs beside them."""
        super().__init__()  # pyright: ignore[reportUnknownMemberType] (torch's stub)
        self.live = 0
        """Bytes that live now."""
        self.peak = 0
        """The most that lived at once, with an operation's scratch."""
        self._scratch = scratch
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        if self._scratch is not None:
            self.peak = max(self.peak, self.live + self._scratch(func, args, made))
        return made

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.live -= size


@contextmanager
def saved_bytes(known: Iterable[Tensor]) -> Generator[Mapping[Any, int]]:
    """Storage → bytes of all that autograd saved while inside and still keeps, `known` (weights) left out.

    Each storage counts once, however many operations save it. What a checkpointed block computes again is not saved.
    """
    own: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
    found: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # a branch that is not used is let go

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in own:
            found[storage] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
