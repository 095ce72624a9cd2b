"""Loss weights by timestep, and by place in the picture."""

from __future__ import annotations

import torch
from torch import Tensor


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-γ weight on the squared error of the prediction, elementwise (Hang et al. 2023).

    min(SNR, γ) / SNR where the network predicts ε (their section 3.4), min(SNR, γ) / (SNR + 1) where it
    predicts v: both weigh the error of z_0 by min(SNR, γ).
    """
    divisor = snr if prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / divisor


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
