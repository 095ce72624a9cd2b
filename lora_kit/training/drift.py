"""How far training moved the network where it should have stayed: on prompts that have nothing to do with the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kit.diffusion import generator_for
from lora_kit.models import ModelBundle
from lora_kit.models.pipelines import scheduler_named

STEPS = 8
"""Points on the base's way from noise to a picture."""

Conditions = Callable[[list[str]], Any]


class Trace(NamedTuple):
    """One prompt's way through the base, without guidance."""

    prompt: str
    latents: Tensor
    """[steps, c, h, w], what the base was asked about."""
    timesteps: Tensor
    """int64 [steps]."""
    predictions: Tensor
    """[steps, c, h, w], what it said."""


@torch.no_grad()
def traces(
    bundle: ModelBundle, conditions: Conditions, prompts: Sequence[str], shape: Sequence[int], seed: int
) -> list[Trace]:
    """The base draws each prompt by DDIM in `STEPS` steps from fixed noise. To be called with all adapters off.

    shape: of a latent, [c, h, w].
    """
    config = {**bundle.scheduler_config, "prediction_type": bundle.prediction_type}
    found: list[Trace] = []
    for number, prompt in enumerate(prompts):
        scheduler = scheduler_named("ddim", config)
        scheduler.set_timesteps(STEPS)
        noise = torch.randn(1, *shape, generator=generator_for(seed, "drift", number))
        latents = noise.to(bundle.device) * scheduler.init_noise_sigma
        asked: list[Tensor] = []
        said: list[Tensor] = []
        for timestep in scheduler.timesteps:
            at = timestep.reshape(1).to(bundle.device, torch.int64)
            prediction = bundle.family.predict(bundle, latents, at, conditions([prompt]))
            asked.append(latents)
            said.append(prediction)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
        times = scheduler.timesteps.to(bundle.device, torch.int64)
        found.append(Trace(prompt, torch.cat(asked), times, torch.cat(said)))
    return found


@torch.no_grad()
def drift(bundle: ModelBundle, conditions: Conditions, known: Sequence[Trace]) -> float:
    """Mean over prompts of ‖prediction - base's‖² / ‖base's‖² at the points of the base's own way; 0: nothing moved."""
    shares: list[float] = []
    for trace in known:
        condition = conditions([trace.prompt] * len(trace.timesteps))
        now = bundle.family.predict(bundle, trace.latents, trace.timesteps, condition)
        moved = (now - trace.predictions).double().square().sum()
        shares.append(float(moved / trace.predictions.double().square().sum()))
    return sum(shares) / len(shares)
