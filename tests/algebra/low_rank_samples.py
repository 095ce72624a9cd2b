"""Random low-rank updates, and dense float64 matrices to check them against."""

from __future__ import annotations

import torch

from lora_kit.adapters import AdapterState, LoraUpdate, Update

SHAPES = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (24, 24),
    "unet.mid_block.resnets.0.conv1": (20, 16, 3, 3),
    "unet.mid_block.attentions.0.proj_in": (24, 24, 1, 1),
    "text_encoder.encoder.layers.0.mlp.fc1": (40, 20),
}


def lora(shape: tuple[int, ...], rank: int, alpha: float, seed: int, dtype: torch.dtype = torch.float32) -> LoraUpdate:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator).to(dtype)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator).to(dtype)
    return LoraUpdate(down, up, alpha)


def sample_state(seed: int, rank: int = 4, alpha: float = 2.0, dtype: torch.dtype = torch.float32) -> AdapterState:
    updates: dict[str, Update] = {
        name: lora(shape, rank + index, alpha, 100 * seed + index, dtype)
        for index, (name, shape) in enumerate(SHAPES.items())
    }
    return AdapterState(updates, {})


def dense(update: Update) -> torch.Tensor:
    """ΔW at strength 1 as a float64 matrix, from the parts alone."""
    assert isinstance(update, LoraUpdate)
    up, down = update.up.double().flatten(1), update.down.double().flatten(1)
    return update.alpha / down.shape[0] * (up @ down)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
