"""Loss weights by timestep."""

from __future__ import annotations

from torch import Tensor


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-γ weight on the squared error of the prediction, elementwise (Hang et al. 2023).

    min(SNR, γ) / SNR where the network predicts ε (their section 3.4), min(SNR, γ) / (SNR + 1) where it
    predicts v: both weigh the error of z_0 by min(SNR, γ).
    """
    divisor = snr if prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / divisor
