"""A small network and two made-up updates, for the tests of live layers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_kit.adapters import LoraUpdate, Update
from lora_kit.adapters.layers import base_layer
from lora_kit.adapters.places import module_at
from lora_kit.adapters.state import weight_modules
from lora_kit.targeting import module_tree


class SmallNet(nn.Module):
    """Convolutions, norms of both kinds and a linear layer, in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8)])
        self.up_blocks = nn.ModuleList([nn.Conv2d(8, 6, 1), nn.Linear(6, 6)])
        self.norm = nn.LayerNorm(6)
        self.proj = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down_blocks[1](self.down_blocks[0](self.conv_in(x).tanh()))
        y = self.up_blocks[0](y).mean((2, 3))
        return self.proj(self.norm(self.up_blocks[1](y)))


def small_net(seed: int = 0) -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {"unet": SmallNet().requires_grad_(False)}


def picture(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, eq=False)
class Dense(Update):
    """ΔW = scale · weight, Δbias = scale · bias."""

    weight: Tensor
    bias: Tensor | None = None
    method = "dense"
    needed = allowed = frozenset({"weight"})

    @classmethod
    def from_parts(cls, parts, alpha, shape):
        raise NotImplementedError

    @property
    def roundings(self):
        raise NotImplementedError

    def parts(self):
        return {"weight": self.weight}

    def weight_delta(self, scale, weight=None, dtype=torch.float32):
        return scale * self.weight.to(dtype)

    def bias_delta(self, scale, bias=None, dtype=torch.float32):
        return None if self.bias is None else scale * self.bias.to(dtype)


@dataclass(frozen=True, eq=False)
class Turned(Update):
    """ΔW = scale · (turn · W - W): depends on the weight, as OFT and DoRA do."""

    turn: Tensor
    """[out, out]"""
    method = "turned"
    needed = allowed = frozenset({"turn"})
    needs_weight = True

    @classmethod
    def from_parts(cls, parts, alpha, shape):
        raise NotImplementedError

    @property
    def roundings(self):
        raise NotImplementedError

    def parts(self):
        return {"turn": self.turn}

    def weight_delta(self, scale, weight=None, dtype=torch.float32):
        assert weight is not None
        turned = torch.einsum("oi,i...->o...", self.turn.to(dtype), weight.to(dtype))
        return scale * (turned - weight.to(dtype))


def lora_updates(components: Mapping[str, nn.Module], seed: int = 0, rank: int = 2) -> dict[str, Update]:
    """A plain LoRA on every linear and convolution."""
    generator = torch.Generator().manual_seed(seed)
    return {
        module.name: LoraUpdate(
            torch.randn(rank, *module.shape[1:], generator=generator),
            0.3 * torch.randn(module.shape[0], rank, *(1 for _ in module.shape[2:]), generator=generator),
            1.5,
        )
        for module in weight_modules(components).values()
    }


def dense_updates(components: Mapping[str, nn.Module], seed: int = 0) -> dict[str, Update]:
    """A full difference on every layer with a weight, norms among them; biases where there are some."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Update] = {}
    for module in module_tree(components):
        base = base_layer(module_at(components, module.name))
        bias = None if base.bias is None else 0.3 * torch.randn(base.bias.shape, generator=generator)
        found[module.name] = Dense(0.3 * torch.randn(module.shape, generator=generator), bias)
    return found


def turned_updates(components: Mapping[str, nn.Module], seed: int = 0) -> dict[str, Update]:
    """A rotation of the outputs of every linear and convolution."""
    generator = torch.Generator().manual_seed(seed)
    return {
        module.name: Turned(torch.linalg.qr(torch.randn(module.shape[0], module.shape[0], generator=generator))[0])
        for module in weight_modules(components).values()
    }


def digests(components: Mapping[str, nn.Module]) -> dict[str, str]:
    """sha256 of the bytes of every parameter and buffer, by name."""
    return {
        f"{component}.{name}": hashlib.sha256(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for component, network in components.items()
        for name, tensor in network.state_dict().items()
    }


def snapshot(components: Mapping[str, nn.Module]) -> object:
    """Which module and Parameter objects stand where, with their flags, modes and hidden attributes."""
    modules = [
        (name, inner, id(module), module.training, sorted(vars(module)))
        for name, network in components.items()
        for inner, module in network.named_modules()
    ]
    parameters = [
        (name, inner, id(weight), weight.requires_grad, weight.dtype)
        for name, network in components.items()
        for inner, weight in network.named_parameters()
    ]
    return modules, parameters
