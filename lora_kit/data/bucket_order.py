"""Position in the stream → sample, where a step's samples must be of one size, and where there is only one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_kit.data.bucket_places import Places, has_buckets
from lora_kit.data.order import permutation
from lora_kit.data.records import Record
from lora_kit.errors import DataError
from lora_kit.recipe import BucketSection, DataSection


class Turn(NamedTuple):
    """What stands at a position of the stream."""

    epoch: int
    sample: int
    """Number within the epoch's unshuffled list of samples."""
    chance: int
    """What its draws derive from: the sample's number, or, where a batch goes on with samples that the epoch already
    had, a number beyond all samples."""


class Order(Protocol):
    """A pure function of (seed, position). Step s holds the positions s · batch_size … , `size_of(s)` of them."""

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in an epoch; whole with buckets."""
        ...

    @property
    def mean_batch_size(self) -> float:
        """Samples of a step, on average over an epoch."""
        ...

    def size_of(self, step: int) -> int:
        """Samples of an optimizer step, over all processes."""
        ...

    def epochs_before(self, step: int) -> int:
        """Whole epochs that are done when optimizer step `step` (0-based) begins."""
        ...

    def locate(self, position: int) -> Turn:
        """What stands at this position."""
        ...


class StreamOrder:
    """All samples are of one size: epochs follow one another without a gap, and a step may hold the end of one and the
    beginning of the next."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed

    @property
    def steps_per_epoch(self) -> float:
        """As Order."""
        return self.count / self.batch_size

    @property
    def mean_batch_size(self) -> float:
        """As Order."""
        return float(self.batch_size)

    def size_of(self, step: int) -> int:
        """As Order: always the whole batch."""
        return self.batch_size

    def epochs_before(self, step: int) -> int:
        """As Order."""
        return step * self.batch_size // self.count

    def locate(self, position: int) -> Turn:
        """As Order."""
        epoch, place = divmod(position, self.count)
        sample = int(permutation(self.seed, epoch, self.count)[place])
        return Turn(epoch, sample, sample)


class BucketOrder:
    """Each step's samples are of one bucket, and an epoch is a whole number of steps.

    A bucket of n samples has ⌈n / batch_size⌉ steps in an epoch; all buckets' steps are shuffled together. Within it
    samples come in the order of the epoch's one permutation. Where they do not fill the last step, it goes on with the
    first of them again (`wraps`), as often around as it takes, or is short.
    """

    def __init__(self, buckets: NDArray[np.int64], batch_size: int, wraps: bool, seed: int) -> None:
        """Buckets: int64 [n], the bucket of each of an epoch's samples; every bucket from 0 on has one."""
        self.buckets = buckets
        self.batch_size = batch_size
        self.wraps = wraps
        self.seed = seed
        self.counts = np.bincount(buckets)
        self.steps = -(-self.counts // batch_size)
        """Steps of each bucket in an epoch."""
        self._bucket_of_batch = np.repeat(np.arange(len(self.counts)), self.steps)
        self._first_batch = np.cumsum(self.steps) - self.steps
        self._first_sample = np.cumsum(self.counts) - self.counts
        self._sorted: dict[int, NDArray[np.int64]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """As Order."""
        return len(self._bucket_of_batch)

    @property
    def mean_batch_size(self) -> float:
        """As Order."""
        return float(self.batch_size) if self.wraps else len(self.buckets) / self.steps_per_epoch

    def size_of(self, step: int) -> int:
        """As Order."""
        bucket, begin = self._batch(step)
        return self.batch_size if self.wraps else min(self.batch_size, int(self.counts[bucket]) - begin)

    def epochs_before(self, step: int) -> int:
        """As Order."""
        return step // self.steps_per_epoch

    def locate(self, position: int) -> Turn:
        """As Order. Raises IndexError for a position that a short step does not have."""
        step, place = divmod(position, self.batch_size)
        epoch = step // self.steps_per_epoch
        bucket, begin = self._batch(step)
        lap, place = divmod(begin + place, int(self.counts[bucket]))
        if lap and not self.wraps:
            raise IndexError(f"position {position}: step {step} has only {self.size_of(step)} samples")
        sample = int(self._by_bucket(epoch)[self._first_sample[bucket] + place])
        return Turn(epoch, sample, sample + lap * len(self.buckets))

    def _batch(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and which of the bucket's samples in the epoch it begins with."""
        epoch, turn = divmod(step, self.steps_per_epoch)
        batch = int(permutation(self.seed, epoch, self.steps_per_epoch, "batches")[turn])
        bucket = int(self._bucket_of_batch[batch])
        return bucket, (batch - int(self._first_batch[bucket])) * self.batch_size

    def _by_bucket(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's samples in their order, one bucket after the other."""
        if epoch not in self._sorted:
            order = permutation(self.seed, epoch, len(self.buckets))
            if len(self._sorted) > 1:  # two: around an epoch's end both are asked for
                self._sorted.pop(next(iter(self._sorted)))
            self._sorted[epoch] = order[np.argsort(self.buckets[order], kind="stable")]
        return self._sorted[epoch]


def samples_of(records: Sequence[Record], places: Places) -> NDArray[np.int64]:
    """An epoch's samples before they are shuffled: int64 [n], the place of each. A record's `repeats` say how often.

    Raises DataError where there are no records.
    """
    if not records:
        raise DataError("The data set has no records. Check data.sources and their where.")
    repeats = np.array([record.repeats for record in records])
    return np.repeat(np.arange(len(places.record)), repeats[places.record])


def order_of(samples: NDArray[np.int64], places: Places, section: DataSection, seed: int) -> Order:
    """The order of `samples_of`, as the section asks for it."""
    if not has_buckets(section):
        return StreamOrder(len(samples), section.batch_size, seed)
    wraps = (section.buckets or BucketSection()).short == "wrap"
    return BucketOrder(places.bucket[samples], section.batch_size, wraps, seed)
