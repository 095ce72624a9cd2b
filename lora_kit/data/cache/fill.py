"""Filling the cache: a stream of pictures, so that memory does not grow with their number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lora_kit.data.cache.hints import PictureHints
from lora_kit.data.cache.keys import StoredDtype, View, latent_key
from lora_kit.data.cache.pictures import Loaded, PictureFiles, Views, survey
from lora_kit.data.cache.store import CacheStore
from lora_kit.data.cache.views import Facts
from lora_kit.data.records import MAX_NAMED, Record
from lora_kit.data.workers import worker_options
from lora_kit.errors import ModelError
from lora_kit.progress import ProgressBar

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pixels [b, 3, H, W] in -1..1 → (mean, std), each [b, c, h, w]."""
TextEncode = Callable[[list[str]], Sequence[Tensor]]
"""Captions → each one's states [tokens, width]."""
STORED = {"fp32": torch.float32, "fp16": torch.float16}
_HELD_BATCHES = 4


class LatentJob(NamedTuple):
    """What is stored of each picture, and how it is made."""

    views: Views
    encode: Encode
    """Called with at most `micro_batch` pictures of one size."""
    vae: str
    """The VAE's fingerprint."""
    stored: StoredDtype
    micro_batch: int
    workers: int
    """Processes that read pictures; 0 reads them between micro-batches."""
    raises: bool
    """Stop at broken pictures, once enough are found to name; else go on without them."""

    def keys(self, record: Record, facts: Facts) -> list[bytes]:
        """The keys of a picture's views, in their order."""
        return [self.key(facts, view) for view in self.views(record, facts)]

    def key(self, facts: Facts, view: View) -> bytes:
        """The key of one view."""
        return latent_key(facts.sha256, view, self.vae, self.stored)


class FillShare(NamedTuple):
    """Which of the missing pictures a process encodes: every `world`-th, beginning anywhere.

    Processes that know nothing of each other begin at different places and pass over what the other has written.
    """

    rank: int = 0
    world: int = 1
    start: float = 0.0
    """0..1."""

    def of(self, indices: Sequence[int]) -> list[int]:
        """The indices of this share, in order."""
        mine = list(indices[self.rank :: self.world])
        first = int(self.start * len(mine))
        return mine[first:] + mine[:first]


class Filled(NamedTuple):
    """What filling did."""

    facts: list[Facts | None]
    """Of each record; None where it is broken or another process's share."""
    broken: dict[int, str]
    """Record → why it cannot be used, in order."""
    encoded: int
    """Views that were encoded."""
    keys: list[list[bytes] | None]
    """Of each record's views, as `LatentJob.keys`; None as for `facts`."""
    notes: dict[int, str]
    """Record → what was wrong with its picture but did not keep it from being read; of those that were read now."""


def missing_pictures(store: CacheStore, keys: Sequence[Sequence[bytes] | None]) -> list[int]:
    """The records of which a view is not in the cache, or whose picture nothing is known of (None)."""
    return [index for index, own in enumerate(keys) if own is None or any(key not in store for key in own)]


def fill_latents(
    store: CacheStore,
    hints: PictureHints,
    records: Sequence[Record],
    job: LatentJob,
    share: FillShare,
    bar: ProgressBar,
) -> Filled:
    """Encode and store what is missing of this share. Opens no picture that hints and cache know.

    Broken pictures come back in the result; with `job.raises`, ten of them end the work. Raises ModelError if the VAE
    gives values that are not finite, DataError if the cache cannot be written. What was stored before stays.
    """
    facts = survey(records, hints)
    known = zip(records, facts, strict=True)
    keys = [job.keys(record, fact) if fact is not None else None for record, fact in known]
    indices = share.of(missing_pictures(store, keys))
    if not indices:  # no worker is started for nothing
        return Filled(facts, {}, 0, keys, {})
    loader: DataLoader[Loaded] = DataLoader(
        PictureFiles(records, indices, job.views), batch_size=None, **worker_options(job.workers)
    )
    work = _Encoder(store, hints, job, [record.id for record in records])
    broken, notes = dict[int, str](), dict[int, str]()
    with store, closing(bar(loader, "Encoding pictures", len(indices))) as stream:
        for loaded in stream:
            facts[loaded.record], keys[loaded.record] = loaded.facts, None
            if loaded.facts is not None:
                keys[loaded.record] = job.keys(records[loaded.record], loaded.facts)
            if loaded.note:
                notes[loaded.record] = loaded.note
            if loaded.facts is None:
                broken[loaded.record] = loaded.reason
            elif not (job.raises and broken):  # nothing is worth encoding then: only the others' names are
                work.add(loaded, loaded.facts)
            if job.raises and len(broken) == MAX_NAMED:
                break
        work.finish()
    hints.flush()
    return Filled(facts, dict(sorted(broken.items())), work.encoded, keys, notes)


class _Waiting(NamedTuple):
    key: bytes
    record: int
    pixels: Tensor
    mask: Tensor | None


class _Encoder:
    """Collects views of equal size into micro-batches, encodes and stores them."""

    def __init__(self, store: CacheStore, hints: PictureHints, job: LatentJob, ids: list[str]) -> None:
        self.store = store
        self.hints = hints
        self.job = job
        self.ids = ids
        self.encoded = 0
        self._waiting: defaultdict[tuple[int, int], list[_Waiting]] = defaultdict(list)
        self._keys: set[bytes] = set()
        """Of what waits: the same picture may be there twice."""

    def add(self, loaded: Loaded, facts: Facts) -> None:
        if loaded.identity is not None:
            self.hints.add(loaded.identity, facts)
        for view, pixels, mask in loaded.views:
            key = self.job.key(facts, view)
            if key in self.store or key in self._keys:
                continue
            self._keys.add(key)
            group = self._waiting[(view.width, view.height)]
            group.append(_Waiting(key, loaded.record, pixels, mask))
            if len(group) == self.job.micro_batch:
                self._encode((view.width, view.height))
        # Many sizes must not hold many pictures: the fullest goes as it is.
        if len(self._keys) >= _HELD_BATCHES * self.job.micro_batch:
            self._encode(max(self._waiting, key=lambda size: len(self._waiting[size])))

    def finish(self) -> None:
        for size in list(self._waiting):
            self._encode(size)

    def _encode(self, size: tuple[int, int]) -> None:
        group = self._waiting.pop(size)
        with torch.no_grad():
            mean, std = self.job.encode(torch.stack([waiting.pixels for waiting in group]))
        dtype = STORED[self.job.stored]
        mean, std = mean.to("cpu", dtype), std.to("cpu", dtype)
        self._refuse_infinite(group, torch.isfinite(mean) & torch.isfinite(std))
        wrote: list[bool] = []
        for row, waiting in enumerate(group):
            tensors = {"mean": mean[row], "std": std[row]}
            if waiting.mask is not None:
                tensors["mask"] = waiting.mask.to(dtype)
            wrote.append(self.store.put(waiting.key, tensors))
        self._keys -= {waiting.key for waiting in group}
        self.encoded += len(group)
        if any(wrote):
            self.hints.flush()

    def _refuse_infinite(self, group: list[_Waiting], finite: Tensor) -> None:
        bad = [self.ids[w.record] for w, ok in zip(group, finite.flatten(1).all(1), strict=True) if not ok]
        if bad:
            fix = "Hold the VAE in fp32" if self.job.stored == "fp32" else "Set data.cache_dtype to fp32"
            raise ModelError(f"The VAE gives latents that are not finite for {', '.join(bad)}. {fix}.")


def fill_texts(
    store: CacheStore,
    captions: Iterable[tuple[str, bytes]],
    encode: TextEncode,
    micro_batch: int,
    bar: ProgressBar,
) -> int:
    """Store the states of captions, given with their keys, that are not in the cache; how many were encoded.

    encode: called with at most `micro_batch` captions; states are stored in the dtype they come in.
    """
    missing = {key: caption for caption, key in captions if key not in store}
    items = list(missing.items())
    starts = range(0, len(items), micro_batch)
    with store, closing(bar(starts, "Encoding captions", len(starts))) as stream:
        for start in stream:
            part = items[start : start + micro_batch]
            with torch.no_grad():
                states = encode([caption for _, caption in part])
            for (key, _), state in zip(part, states, strict=True):
                store.put(key, {"states": state})
    return len(items)
