"""A few real steps on made-up pictures, so that a run's time and memory are known before it begins."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator

from lora_kit.data import Batch, TrainingSet
from lora_kit.data.loader import process_share
from lora_kit.data.sampler import micro_batches
from lora_kit.errors import RecipeError
from lora_kit.models.attention import check_attention
from lora_kit.models.first_stage import latent_channels, vae_factor
from lora_kit.recipe import Recipe
from lora_kit.training.build import build_run
from lora_kit.training.compiling import check_compile
from lora_kit.training.objects import Run
from lora_kit.training.optimization.optimizers import check_optimizer
from lora_kit.training.peak_memory import peak_memory, reset_peak
from lora_kit.training.precision import precision_notices
from lora_kit.training.prepared import PreparedData
from lora_kit.training.processes.launch import build_accelerator, sharding_of
from lora_kit.training.processes.launcher import follow_launcher
from lora_kit.training.sizes import keeps_latents, picture_side
from lora_kit.training.step import training_step

STEPS = 3


class Probe(NamedTuple):
    """What a few steps took."""

    device: str
    """`cpu`, `cuda`, …"""
    side: int
    """Of the pictures, pixels."""
    batch_size: int
    micro_batches: int
    """In a step."""
    seconds: tuple[float, ...]
    """Of each step; the first one also prepares things."""
    peak_bytes: int | None
    """The most memory that was held from the first step on: resident on a CPU, allocated on a GPU. None: this system
    does not tell."""
    loading_bytes: int | None
    """The most that was held until then."""
    losses: tuple[float, ...]
    notices: tuple[str, ...]
    """What the user should be told of how it computes."""

    @property
    def seconds_a_step(self) -> float:
        """The median of all steps but the first."""
        return statistics.median(self.seconds[1:] or self.seconds)

    @property
    def pictures_a_second(self) -> float:
        """At that pace."""
        return self.batch_size / self.seconds_a_step


def probe(recipe: Recipe, steps: int = STEPS) -> Probe:
    """Load the base, and train `steps` steps as the recipe says on noise in the size of its pictures.

    Nothing is read of its data, and nothing is written. Latents are at hand where the recipe keeps them; else the VAE
    is part of a step.

    Raises RecipeError under a launch of several processes, and all that a run raises before its first step.
    """
    recipe = follow_launcher(recipe)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"trackers": []})})
    accelerator = build_accelerator(recipe)
    if accelerator.num_processes > 1 or sharding_of(accelerator) is not None:
        raise RecipeError("--probe measures one process by itself; run it without `accelerate launch`.")
    check_optimizer(recipe, accelerator.device)
    check_attention(recipe.model.attention)
    check_compile(recipe, accelerator.device)
    reset_peak(accelerator.device)
    run = build_run(recipe, accelerator, resumes=True, data=stand_in_data(recipe))
    loading = peak_memory(accelerator.device)
    batches = made_up(run, accelerator)
    reset_peak(accelerator.device)
    seconds, losses = list[float](), list[float]()
    for step in range(steps):
        began = time.perf_counter()
        losses.append(training_step(run.learner, batches, step).loss)  # waits for the device
        seconds.append(time.perf_counter() - began)
    return Probe(
        device=accelerator.device.type,
        side=picture_side(recipe),
        batch_size=recipe.data.batch_size,
        micro_batches=len(batches),
        seconds=tuple(seconds),
        peak_bytes=peak_memory(accelerator.device),
        loading_bytes=loading,
        losses=tuple(losses),
        notices=tuple(precision_notices(recipe, accelerator.device)),
    )


def made_up(run: Run, accelerator: Accelerator) -> list[Batch]:
    """A step's micro-batches: noise as pictures or latents, and one caption."""
    recipe, side = run.recipe, picture_side(run.recipe)
    cells = side // vae_factor(run.bundle)
    shape = (latent_channels(run.bundle.vae), cells, cells)
    parts = micro_batches(0, process_share(recipe, accelerator.process_index, accelerator.num_processes))
    latent = None if run.prepared.needs_vae else shape
    picture = (3, side, side) if latent is None or run.bundle.family.needs_pixels else None
    return [_batch(recipe, part, latent, picture) for part in parts]


def _batch(
    recipe: Recipe, positions: Sequence[int], latent: Sequence[int] | None, picture: Sequence[int] | None
) -> Batch:
    count, chance = len(positions), torch.Generator().manual_seed(0)
    pixels = torch.rand(count, *picture, generator=chance) * 2 - 1 if picture is not None else None
    mean = torch.randn(count, *latent, generator=chance) if latent is not None else None
    return Batch(
        ids=[f"made-up-{position}" for position in positions],
        positions=torch.tensor(list(positions), dtype=torch.int64),
        captions=[f"{recipe.data.trigger} a picture".strip()] * count,
        pixels=pixels,
        latent_mean=mean,
        latent_std=torch.full_like(mean, 0.1) if mean is not None else None,
        is_latent=torch.full((count,), latent is not None),
        masks=None,
        loss_weights=torch.ones(count),
        from_base=list(range(count)) if any(one.target == "base" for one in recipe.data.sources) else [],
        step_samples=recipe.data.batch_size,
    )


def stand_in_data(recipe: Recipe) -> PreparedData:
    """Stands for the data: whether latents are kept, and the pictures' size, are all that building a run asks of it."""
    side = picture_side(recipe)
    places = SimpleNamespace(sizes=((side, side),))
    stand_in: Any = SimpleNamespace(latents=object() if keeps_latents(recipe) else None, places=places)
    return PreparedData(cast(TrainingSet, stand_in), None, (), ())
