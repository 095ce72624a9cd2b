"""Which positions of the stream a process takes in each optimizer step, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch.utils.data import Sampler

from lora_kit.errors import RecipeError


@dataclass(frozen=True)
class Share:
    """One process's share of every optimizer step."""

    batch_size: int
    """Pictures in one optimizer step, over all processes."""
    rank: int
    world: int
    micro_batch_size: int
    """Most pictures in one forward pass."""

    def __post_init__(self) -> None:
        if self.batch_size < self.world:
            raise RecipeError(
                f"data.batch_size ({self.batch_size}) is below the number of processes ({self.world}); each needs at "
                "least one picture a step. Raise it, or launch fewer processes."
            )


def micro_batches(step: int, share: Share, samples: int | None = None) -> list[list[int]]:
    """Stream positions of this process's micro-batches in optimizer step `step` (0-based).

    Step s holds positions s·B … s·B + B-1, or the first `samples` of them. Processes take consecutive runs of it, and
    micro-batches consecutive runs of those, whose lengths differ by one at most. A process gets none where there are
    fewer samples than processes.
    """
    start = step * share.batch_size
    first, last = _part(share.batch_size if samples is None else samples, share.rank, share.world)
    count = -(-(last - first) // share.micro_batch_size)
    cuts = [_part(last - first, index, count) for index in range(count)]
    return [list(range(start + first + low, start + first + high)) for low, high in cuts]


class StepSampler(Sampler[list[int]]):
    """Batch sampler: the micro-batches of optimizer steps `first_step` … `max_steps` - 1, one after the other."""

    def __init__(
        self,
        share: Share,
        first_step: int,
        max_steps: int,
        size_of: Callable[[int], int] | None = None,
        even: bool = False,
    ):
        """size_of: samples of a step, over all processes. Default: always the batch size.

        even: every process has as many micro-batches in a step as the first one; see `fillers`.
        """
        self.even = even
        self.share = share
        self.first_step = first_step
        self.max_steps = max_steps
        self.size_of = size_of

    @property
    def per_step(self) -> int:
        """Micro-batches of this process in a step of the whole batch size. Processes can differ by one."""
        return len(micro_batches(0, self.share))

    def counts(self) -> Iterator[int]:
        """Micro-batches of this process in one step after the other."""
        return (len(self._step(step)) for step in range(self.first_step, self.max_steps))

    def fillers(self) -> Iterator[int]:
        """How many of a step's micro-batches, the last ones, are none of this process's: the step's first sample once
        more, which is to count nothing. Networks whose weights are spread over processes run in all or in none."""
        return (self._missing(step) for step in range(self.first_step, self.max_steps))

    def __len__(self) -> int:
        return sum(self.counts())

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.max_steps):
            yield from self._step(step)

    def _step(self, step: int) -> list[list[int]]:
        return self._own(step, self.share) + [[step * self.share.batch_size]] * self._missing(step)

    def _missing(self, step: int) -> int:
        if not self.even:
            return 0
        return len(self._own(step, replace(self.share, rank=0))) - len(self._own(step, self.share))

    def _own(self, step: int, share: Share) -> list[list[int]]:
        return micro_batches(step, share, self.size_of(step) if self.size_of else None)


def _part(length: int, index: int, parts: int) -> tuple[int, int]:
    """Bounds of part `index` of 0 … length-1 cut into `parts`; the first ones are longer by one where needed."""
    size, longer = divmod(length, parts)
    first = index * size + min(index, longer)
    return first, first + size + (index < longer)
