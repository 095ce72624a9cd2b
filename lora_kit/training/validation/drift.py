"""Prior drift: how far predictions for unrelated prompts have moved from the base's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kit.diffusion import Draws, add_noise, generator_for, seed_for, stratified_timesteps
from lora_kit.inference.sampling import SamplingSettings, sample_latents
from lora_kit.models import ModelBundle
from lora_kit.training.conditions import Conditions
from lora_kit.training.objective import Noised, Objective, wanted_prediction
from lora_kit.training.validation.batches import measured_at_once

DRIFT_PROMPTS = (
    "a photo of a dog on a beach",
    "a portrait of an old woman",
    "a bowl of fruit on a wooden table",
    "a street in a city at night",
    "a mountain lake in the morning",
    "a red car in front of a house",
    "an oil painting of a ship at sea",
    "a drawing of a tree",
)
"""Daily things in several manners, for recipes that name none."""
STEPS = 10
"""Sampler steps at most of the base's pictures: they need not be fine, they are noised again."""


class DriftReference(NamedTuple):
    """What the base makes of the prompts: everything on the CPU, b = prompts × timesteps, prompt after prompt."""

    prompts: tuple[str, ...]
    noised: Noised
    """Its own pictures' latents, noised."""
    predictions: Tensor
    """float32 [b, c, h, w]."""
    base_error: float
    """Mean squared difference of the predictions from what the noise and latents ask for: the base's own loss here."""


@torch.no_grad()
def drift_reference(
    prompts: Sequence[str],
    objective: Objective,
    bundle: ModelBundle,
    conditions: Conditions,
    settings: SamplingSettings,
    draws: tuple[int, int],
) -> DriftReference:
    """Draw each prompt with the base, noise the latents, and ask the base once. The bundle must act as the base.

    draws: timesteps of each prompt, stratified over the whole schedule; and the seed.
    """
    count, seed = draws
    seeds = [seed_for(seed, "drift picture", index) for index in range(len(prompts))]
    clean = sample_latents(bundle, prompts, seeds, settings).cpu()
    parts = [_draws(seed, index, count, clean.shape[1:], len(objective.alpha_bars)) for index in range(len(prompts))]
    noise, timesteps = torch.cat([part.noise for part in parts]), torch.cat([part.timesteps for part in parts])
    generators = [generator_for(seed, "drift", index, "beside") for index in range(len(prompts))]
    beside = bundle.family.beside_drawn(bundle, None, clean.shape, generators)
    beside = None if beside is None else beside.cpu().repeat_interleave(count, dim=0)
    clean, alpha_bar = clean.repeat_interleave(count, dim=0), objective.alpha_bars[timesteps]
    noisy = add_noise(clean, noise, alpha_bar.float())
    noised = Noised(clean, noise, noisy, timesteps, alpha_bar, timesteps, beside)
    predictions = _predictions(tuple(prompts), noised, bundle, conditions)
    error = (predictions - wanted_prediction(bundle, noised)).double().square().mean()
    return DriftReference(tuple(prompts), noised, predictions, float(error))


@torch.no_grad()
def drift(reference: DriftReference, bundle: ModelBundle, conditions: Conditions) -> float:
    """Mean squared difference of the predictions from the base's, as a part of the base's own loss on these draws."""
    now = _predictions(reference.prompts, reference.noised, bundle, conditions)
    return float((now - reference.predictions).double().square().mean()) / reference.base_error


def _predictions(prompts: tuple[str, ...], noised: Noised, bundle: ModelBundle, conditions: Conditions) -> Tensor:
    each = len(noised.timesteps) // len(prompts)
    captions = [prompt for prompt in prompts for _ in range(each)]
    found: list[Tensor] = []
    for rows in _rows(len(captions), measured_at_once(*noised.noisy.shape[-2:])):
        part, condition = noised.rows(rows), conditions([captions[row] for row in rows])
        noisy, timesteps = part.noisy.to(bundle.device), part.timesteps.to(bundle.device)
        beside = None if part.beside is None else part.beside.to(bundle.device)
        found.append(bundle.family.predict(bundle, noisy, timesteps, condition, beside).float().cpu())
    return torch.cat(found)


def _rows(count: int, at_once: int) -> Iterator[list[int]]:
    yield from (list(range(start, min(start + at_once, count))) for start in range(0, count, at_once))


def _draws(seed: int, prompt: int, count: int, shape: Sequence[int], timesteps: int) -> Draws:
    generator = generator_for(seed, "drift", prompt)
    times = stratified_timesteps(count, timesteps, generator)
    noise = torch.randn(count, *shape, generator=generator)
    return Draws(noise, noise, times)
