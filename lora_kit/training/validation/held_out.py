"""Losses of fixed pictures with fixed noise and stratified timesteps: the same numbers for the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from lora_kit.data import Batch, TrainingSet, collate
from lora_kit.data.buckets import Size
from lora_kit.diffusion import Draws, generator_for, seed_for, stratified_timesteps
from lora_kit.models import ModelBundle
from lora_kit.training.conditions import Conditions
from lora_kit.training.objective import (
    Objective,
    beside_latents,
    latent_moments,
    noised_latents,
    sample_losses,
    wanted_prediction,
)
from lora_kit.training.validation.batches import measured_at_once


class MeasuredSet(NamedTuple):
    """Pictures and how they are measured. The same (picture, noise, timestep) triples every time."""

    pictures: TrainingSet
    records: tuple[int, ...]
    """Which of them."""
    timesteps_per_picture: int
    seed: int
    use: str = "held-out"
    """Part of the seed: sets have noise of their own."""


@torch.no_grad()
def draw_losses(measured: MeasuredSet, objective: Objective, bundle: ModelBundle, conditions: Conditions) -> Tensor:
    """The loss of each picture at each of its timesteps, float64 [pictures, timesteps], on the CPU; timesteps rise."""
    found: dict[int, list[float]] = {}
    for places in _batches(measured):
        samples = [measured.pictures.plain(measured.records[place]) for place in places]
        batch = cast(Batch, send_to_device(collate(samples), bundle.device))
        moments = latent_moments(bundle, batch)
        beside = beside_latents(bundle, batch, [(measured.seed, measured.use, place) for place in places])
        condition = conditions(batch.captions)
        draws = [_draws(measured, place, moments[0].shape[1:], len(objective.alpha_bars)) for place in places]
        losses: list[Tensor] = []
        for k in range(measured.timesteps_per_picture):
            noised = noised_latents(objective, bundle, moments, _nth(draws, k), beside)
            wanted = wanted_prediction(bundle, noised)
            losses.append(sample_losses(objective, bundle, noised, condition, wanted, batch.masks))
        found |= zip(places, torch.stack(losses, dim=1).tolist(), strict=True)
    return torch.tensor([found[place] for place in range(len(found))], dtype=torch.float64)


def train_subset(training: TrainingSet, count: int, seed: int) -> tuple[int, ...]:
    """`count` records of a training set, or all if there are fewer, the same ones as long as they are there.

    Those with the lowest hash of seed and id; regularisation pictures and those of `target: base` are none of them.
    """
    own = [i for i, record in enumerate(training.records) if not record.is_regularisation and not record.from_base]
    ranked = sorted(own, key=lambda index: seed_for(seed, "train-subset", training.records[index].id))
    return tuple(sorted(ranked[:count]))


def _batches(measured: MeasuredSet) -> Iterator[list[int]]:
    """Places in `records`, those of one size together, as many as are measured at once."""
    by_size: dict[Size, list[int]] = {}
    for place, record in enumerate(measured.records):
        by_size.setdefault(measured.pictures.places.sizes_of(record)[0], []).append(place)
    factor = measured.pictures.latent_factor
    for (width, height), places in by_size.items():
        at_once = measured_at_once(height // factor, width // factor)
        yield from (places[start : start + at_once] for start in range(0, len(places), at_once))


def _draws(measured: MeasuredSet, place: int, shape: Sequence[int], timesteps: int) -> Draws:
    """All draws of one picture: plain noise [k, c, h, w], timesteps [k] over the whole schedule, whatever the objective
    trains on."""
    generator = generator_for(measured.seed, measured.use, place)
    count = measured.timesteps_per_picture
    times = stratified_timesteps(count, timesteps, generator)
    noise = torch.randn(2, count, *shape, generator=generator)
    return Draws(noise[0], noise[1], times)


def _nth(draws: Sequence[Draws], k: int) -> Draws:
    return Draws(*(torch.stack([part[k] for part in parts]) for parts in zip(*(d[:3] for d in draws), strict=True)))
