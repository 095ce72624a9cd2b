"""Loss weights by timestep, and by place in the picture.

A weight is stated by its paper for one target. What the network has wrong about z_0, about ε and about v is the same
mistake in other units: with z_t given, |Δε|² = SNR |Δz_0|² and |Δv|² = (SNR + 1) |Δz_0|². So a weight w on the
squared error of z_0 is w / SNR on that of ε and w / (SNR + 1) on that of v, and each weight below means the same
objective whatever the network predicts. All are 0 at SNR = 0 (zero terminal SNR), where ε tells nothing of z_0;
`epsilon` is never predicted there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def for_target(clean_weight: Tensor, snr: Tensor, prediction_type: str) -> Tensor:
    """A weight on the squared error of z_0, as the weight on that of what the network predicts."""
    divisors = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return clean_weight / divisors[prediction_type]


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-γ weight on the squared error of the prediction, elementwise (Hang et al. 2023).

    min(SNR, γ) / SNR where the network predicts ε (their section 3.4), min(SNR, γ) / (SNR + 1) where it predicts v,
    min(SNR, γ) where it predicts z_0: all weigh the error of z_0 by min(SNR, γ).
    """
    return for_target(snr.clamp(max=gamma), snr, prediction_type)


def soft_min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Soft min-SNR: γ SNR / (SNR + γ) on the error of z_0 (Crowson et al. 2024, "Hourglass Diffusion Transformers").

    Half the harmonic mean of SNR and γ: min(SNR, γ) without the corner, γ/2 at SNR = γ.
    """
    return for_target(gamma * snr / (snr + gamma), snr, prediction_type)


def debiased_weight(snr: Tensor, prediction_type: str) -> Tensor:
    """Debiased estimation: 1 / √SNR on the error of ε, so √SNR on that of z_0 (Yu et al. 2023)."""
    return for_target(snr.sqrt(), snr, prediction_type)


def p2_weight(snr: Tensor, gamma: float, k: float, prediction_type: str) -> Tensor:
    """P2: 1 / (k + SNR)^γ on the error of ε (Choi et al. 2022: their λ'_t over L_simple's λ_t)."""
    return for_target(snr / (k + snr) ** gamma, snr, prediction_type)


def v_as_epsilon_weight(snr: Tensor) -> Tensor:
    """SNR / (SNR + 1) on the error of v, which makes it the plain error of ε.

    sd-scripts' `scale_v_pred_loss_like_noise_pred`, without its bound of 1000 on the SNR.
    """
    return for_target(snr, snr, "v_prediction")


def masked_mean(errors: Tensor, masks: Tensor | None, unmasked_weight: float = 0.0) -> Tensor:
    """Σ w · e / Σ w over each sample's channels and cells, float32 [b], with w = m + (1 - m) · unmasked_weight.

    errors: [b, c, h, w]; masks m: [b, h, w] in 0..1, None: 1 everywhere. Normalised by the mask's area, so that a
    small subject counts as much as one that fills the picture. A sample whose weights are all 0 has loss 0.
    """
    if masks is None:
        return errors.mean(dim=(1, 2, 3))
    weights = masks + (1 - masks) * unmasked_weight
    area = weights.sum(dim=(1, 2))
    return (errors.mean(dim=1) * weights).sum(dim=(1, 2)) / area.clamp(min=torch.finfo(errors.dtype).tiny)
