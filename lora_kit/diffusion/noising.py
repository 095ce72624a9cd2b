"""The forward process and what the network is asked to predict. z, ε: [b, c, h, w]; ᾱ: [b]."""

from __future__ import annotations

from torch import Tensor

from lora_kit.errors import ModelError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def add_noise(z0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """z_t = √ᾱ z_0 + √(1 - ᾱ) ε (Ho et al. 2020, eq. 4)."""
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * z0 + (1 - a).sqrt() * noise


def target(prediction_type: str, z0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """ε, v = √ᾱ ε - √(1 - ᾱ) z_0 (Salimans & Ho 2022, section 4), or `sample`: z_0.

    Raises ModelError for any other prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        a = alpha_bar.view(-1, 1, 1, 1)
        return a.sqrt() * noise - (1 - a).sqrt() * z0
    if prediction_type == "sample":
        return z0
    raise ModelError(f"prediction_type {prediction_type!r} is not known. Known: {', '.join(PREDICTION_TYPES)}.")
