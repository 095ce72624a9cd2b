"""Held-out loss of adapter files by one measure: the same pictures, noise and timesteps, whoever trained them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lora_kit.adapters import AdapterState, read_adapter
from lora_kit.data.crops import pixels_of
from lora_kit.diffusion import add_noise, alphas_cumprod, target
from lora_kit.models.loading import load_bundle
from lora_kit.recipe import Recipe
from lora_kit.recipe.sections import ModelSection

DRAWS = 4
"""Timesteps of each picture, one in each equal part of the schedule."""


@torch.no_grad()
def held_out_losses(recipe: Recipe, base: Path, files: Sequence[Path]) -> list[float]:
    """Mean squared error of the base alone, and with each file at strength 1, in fp32."""
    bundle = load_bundle(ModelSection(base=str(base)))
    held_out: Any = recipe.validation.held_out
    latents, condition = _encoded(bundle, Path(held_out.path), recipe.data.resolution)
    draw = torch.Generator().manual_seed(0)
    alpha_bars = alphas_cumprod(bundle.scheduler_config)

    noise = torch.randn(DRAWS, *latents.shape, generator=draw)
    places = (torch.arange(DRAWS)[:, None] + torch.rand(DRAWS, len(latents), generator=draw)) / DRAWS
    times = (places * len(alpha_bars)).long()

    def loss() -> float:
        errors = list[Tensor]()
        for added, at in zip(noise, times, strict=True):
            alpha_bar = alpha_bars[at].float()
            noisy = add_noise(latents, added, alpha_bar)
            wanted = target(bundle.prediction_type, latents, added, alpha_bar)
            errors.append((bundle.family.predict(bundle, noisy, at, condition) - wanted).square().mean())
        return float(torch.stack(errors).mean())

    found = [loss()]
    for file in files:
        before = {name: weight.clone() for name, weight in bundle.unet.state_dict().items()}
        _merge(bundle.unet, read_adapter(file, bundle.components))
        found.append(loss())
        bundle.unet.load_state_dict(before)
    return found


def _encoded(bundle: Any, folder: Path, resolution: int) -> tuple[Tensor, Any]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    squares = [Image.open(folder / row["file_name"]).convert("RGB").resize((resolution, resolution)) for row in rows]
    mean, std = bundle.family.encode(bundle, torch.stack([pixels_of(square) for square in squares]))
    latents = bundle.family.target_latents(bundle, mean, std, torch.zeros_like(mean))
    return latents, bundle.family.condition(bundle, [row["text"] for row in rows], "cut")


def _merge(unet: nn.Module, state: AdapterState) -> None:
    for name, update in state.updates.items():
        weight = unet.get_submodule(name.removeprefix("unet.")).weight
        assert isinstance(weight, Tensor)
        change = update.weight_delta(1.0, weight, torch.float32)
        assert change is not None
        weight.add_(change)
