"""Training set → micro-batches → optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from lora_kit.data.batch import Batch
from lora_kit.data.sampler import Share, StepSampler
from lora_kit.data.samples import Sample, collate
from lora_kit.data.training_set import TrainingSet
from lora_kit.data.workers import held_signals, worker_options
from lora_kit.recipe import Recipe


class Processes(Protocol):
    """What the loader asks an accelerate.Accelerator."""

    @property
    def num_processes(self) -> int: ...  # noqa: D102
    @property
    def process_index(self) -> int: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102


def make_loader(
    training_set: TrainingSet, recipe: Recipe, processes: Processes, first_step: int = 0, even: bool = False
) -> Iterator[list[Batch]]:
    """This process's micro-batches of one optimizer step after the other, from `first_step` to `max_steps`. None in a
    step of fewer samples than processes, where this process has no sample.

    even: then, and where others have more, there are micro-batches whose losses count nothing, so that all processes
    have equally many.

    Raises RecipeError if there are more processes than pictures in a step. Not to be prepared by accelerate,
    which would share the batches out a second time.
    """
    share = process_share(recipe, processes.process_index, processes.num_processes)
    sampler = StepSampler(share, first_step, recipe.train.max_steps, training_set.order.size_of, even)
    loader = make_batch_loader(training_set, sampler, pin_memory=processes.device.type == "cuda")
    return _steps(loader, sampler)


def process_share(recipe: Recipe, rank: int, world: int) -> Share:
    """The share of process `rank` of `world`; by default in one micro-batch."""
    micro_batch_size = recipe.train.micro_batch_size or recipe.data.batch_size
    return Share(recipe.data.batch_size, rank, world, micro_batch_size)


def make_batch_loader(training_set: TrainingSet, sampler: StepSampler, pin_memory: bool = False) -> DataLoader[Sample]:
    """A DataLoader that yields a `Batch` for each micro-batch of the sampler. Latents in memory need no workers."""
    latents = training_set.latents
    in_memory = latents is not None and latents.in_memory and not training_set.keeps_pixels
    workers = 0 if in_memory else training_set.section.workers
    return DataLoader(
        training_set, batch_sampler=sampler, collate_fn=collate, pin_memory=pin_memory, **worker_options(workers)
    )


def _steps(loader: DataLoader[Sample], sampler: StepSampler) -> Iterator[list[Batch]]:
    with held_signals():
        batches: Iterator[Any] = iter(loader)
    for count, fillers in zip(sampler.counts(), sampler.fillers(), strict=True):
        own = list(islice(batches, count - fillers))
        yield own + [_weightless(batch) for batch in islice(batches, fillers)]


def _weightless(batch: Batch) -> Batch:
    return batch._replace(loss_weights=torch.zeros_like(batch.loss_weights))
