"""Held-out loss with fixed noise and stratified timesteps, as the paired difference to the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from accelerate.utils import send_to_device

from lora_kit.data import Batch, TrainingSet, collate
from lora_kit.data.buckets import Size
from lora_kit.diffusion import Draws, generator_for, stratified_timesteps
from lora_kit.models import ModelBundle
from lora_kit.training.conditions import Conditions
from lora_kit.training.objective import Objective, latent_moments, noised_latents, sample_losses, wanted_prediction

BATCH = 16


class HeldOut(NamedTuple):
    """The held-out set and how it is measured. The same (picture, noise, timestep) triples every time."""

    pictures: TrainingSet
    timesteps_per_picture: int
    seed: int
    records: tuple[int, ...] | None = None
    """Which of the pictures; None: all."""


@torch.no_grad()
def held_out_losses(
    held_out: HeldOut, objective: Objective, bundle: ModelBundle, conditions: Conditions
) -> list[list[float]]:
    """Each picture's loss at each of its timesteps, from low to high ones."""
    found: dict[int, list[float]] = {}
    for indices in _batches(held_out):
        samples = [held_out.pictures.plain(index) for index in indices]
        batch = cast(Batch, send_to_device(collate(samples), bundle.device))
        moments = latent_moments(bundle, batch)
        condition = conditions(batch.captions)
        draws = [_draws(held_out, index, moments[0].shape[1:], len(objective.alpha_bars)) for index in indices]
        losses: list[torch.Tensor] = []
        for k in range(held_out.timesteps_per_picture):
            noised = noised_latents(objective, bundle, moments, _nth(draws, k))
            wanted = wanted_prediction(bundle, noised)
            losses.append(sample_losses(objective, bundle, noised, condition, wanted, batch.masks))
        found |= zip(indices, torch.stack(losses, dim=1).tolist(), strict=True)
    return [found[record] for record in sorted(found)]


def band_count(timesteps: int) -> int:
    """Into how many equal parts of the schedule the stratified draws of a picture can be told apart; at most 4."""
    return next(count for count in (4, 3, 2, 1) if timesteps % count == 0)


def _batches(held_out: HeldOut) -> Iterator[list[int]]:
    """Records of one size together, at most BATCH of them."""
    pictures, by_size = held_out.pictures, dict[Size, list[int]]()
    for record in range(pictures.record_count) if held_out.records is None else held_out.records:
        by_size.setdefault(pictures.places.sizes_of(record)[0], []).append(record)
    for records in by_size.values():
        yield from (records[start : start + BATCH] for start in range(0, len(records), BATCH))


def _draws(held_out: HeldOut, index: int, shape: Sequence[int], timesteps: int) -> Draws:
    """All draws of one picture: plain noise [k, c, h, w], timesteps [k] over the whole schedule, whatever the objective
    trains on."""
    generator = generator_for(held_out.seed, "held-out", index)
    count = held_out.timesteps_per_picture
    times = stratified_timesteps(count, timesteps, generator)
    noise = torch.randn(2, count, *shape, generator=generator)
    return Draws(noise[0], noise[1], times)


def _nth(draws: Sequence[Draws], k: int) -> Draws:
    return Draws(*(torch.stack([part[k] for part in parts]) for parts in zip(*(d[:3] for d in draws), strict=True)))
