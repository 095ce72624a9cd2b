"""Other noise than white: what is added to it, or put in its place. ε: [b, c, h, w], or [c, h, w] of one sample."""

from __future__ import annotations

from torch import Generator, Tensor
from torch import rand as uniform
from torch import randn as normal
from torch.nn.functional import interpolate


def offset_noise(noise: Tensor, constants: Tensor, scale: Tensor | float) -> Tensor:
    """ε + s n with one constant n per channel (Guttenberg 2023, "Diffusion with offset noise").

    noise: [b, c, h, w]; constants n: standard normal [b, c, 1, 1]; scale s: a number, or [b, c, 1, 1].
    """
    return noise + scale * constants


def adaptive_offset(z0: Tensor, offset: float, adaptive_scale: float) -> Tensor:
    """max(0, s + a |mean z_0|) for each channel, [b, c, 1, 1]: the scale of `offset_noise` by the picture itself.

    sd-scripts' `adaptive_noise_scale` (library/custom_train_functions.py, `apply_noise_offset`). z0: [b, c, h, w].
    """
    return (offset + adaptive_scale * z0.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)


def pyramid_noise(noise: Tensor, levels: int, discount: float, generator: Generator) -> Tensor:
    """Multi-resolution noise of one sample: (ε + Σ_i d^i · up(ε_i)) / its own deviation, [c, h, w].

    Level i = 0 … levels-1 is white noise of a grid that is r^i times coarser, r drawn anew from 2 … 4 for each, made
    as large as ε by bilinear interpolation; the first that is one cell high or wide is the last (Whitaker 2023,
    "Multi-Resolution Noise for Diffusion Model Training"; sd-scripts' `multires_noise_iterations` and
    `multires_noise_discount`). Unit deviation over the sample: other trainers divide by the whole batch's, which
    would let one sample's noise depend on its neighbours'.
    """
    channels, height, width = noise.shape
    total = noise
    for level in range(levels):
        factor = float(2 + 2 * uniform((), generator=generator)) ** level
        size = (max(1, int(height / factor)), max(1, int(width / factor)))
        coarse = normal(1, channels, *size, generator=generator)
        total = total + discount**level * interpolate(coarse, (height, width), mode="bilinear")[0]
        if 1 in size:
            break
    return total / total.std()


def perturbed(noise: Tensor, other: Tensor, gamma: float) -> Tensor:
    """ε + γ ξ, what the input is noised with while the target keeps ε (Ning et al. 2023, "Input Perturbation Reduces
    Exposure Bias in Diffusion Models"). other ξ: standard normal in ε's shape."""
    return noise + gamma * other
