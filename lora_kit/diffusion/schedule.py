"""The noise schedule of a base, from its scheduler's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_kit.errors import ModelError

SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """ᾱ_t for t = 0 … T-1, float64 [T] (Ho et al. 2020, section 2: ᾱ_t = ∏ (1 - β_s)).

    `scaled_linear` is linear in √β (Rombach et al. 2022, the schedule of Stable Diffusion);
    `squaredcos_cap_v2` is Nichol & Dhariwal 2021, eq. 17, with β capped at 0.999. With `rescale_betas_zero_snr` of the
    config, `rescale_zero_terminal_snr` of that.

    Raises ModelError if the config's `beta_schedule` is none of SCHEDULES.
    """
    count = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    name = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif name == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
    elif name == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif name == "squaredcos_cap_v2":
        times = torch.arange(count + 1, dtype=torch.float64) / count
        bars = torch.cos((times + 0.008) / 1.008 * torch.pi / 2).square()
        betas = (1 - bars[1:] / bars[:-1]).clamp(max=0.999)
    else:
        raise ModelError(
            f"beta_schedule {name!r} of the base's scheduler config is not known. Known: {', '.join(SCHEDULES)}."
        )
    alpha_bars = (1 - betas).cumprod(0)
    return rescale_zero_terminal_snr(alpha_bars) if config.get("rescale_betas_zero_snr") else alpha_bars


def rescale_zero_terminal_snr(alpha_bars: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the last timestep is noise alone and the first stays (Lin et al. 2023, algorithm 1).

    √ᾱ'_t = (√ᾱ_t - √ᾱ_T) √ᾱ_1 / (√ᾱ_1 - √ᾱ_T). The last is exactly 0, and the first the same number. alpha_bars: [T].
    """
    roots = alpha_bars.sqrt()
    rescaled = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
    rescaled[0] = alpha_bars[0]  # the equation's own value but for rounding
    return rescaled


def signal_to_noise(alpha_bar: Tensor) -> Tensor:
    """SNR = ᾱ / (1 - ᾱ) (Kingma et al. 2021), elementwise; 0 where ᾱ = 0."""
    return alpha_bar / (1 - alpha_bar)
