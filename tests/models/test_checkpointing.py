"""Activation checkpointing: the same gradients to the bit, and no block computed twice that nothing flows through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kit.adapters import inject
from lora_kit.models import load_bundle
from lora_kit.models.checkpointing import checkpoint_unet
from lora_kit.recipe import ModelSection
from lora_kit.recipe.rules import TargetRule
from lora_kit.targeting import make_plan, module_tree

BLOCKS = ("resnets.", "transformer_blocks.")
UNCHECKED = "mid_block.resnets.0"
"""diffusers (0.42) checkpoints every block but this one."""


def _network(base: Path, match: str) -> nn.Module:
    unet: Any = load_bundle(ModelSection(base=str(base))).unet
    components = {"unet": unet}
    inject(components, make_plan([TargetRule(match=match, rank=4)], module_tree(components)))
    with torch.no_grad():  # up matrices of zero would give the down matrices no gradient
        for name, weight in unet.named_parameters():
            if ".lora_B." in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return unet.train()


def _gradients(unet: Any, states_want_gradients: bool = False) -> tuple[dict[str, Tensor], Counter[str]]:
    """Each trained weight's gradient, and how often each block ran, forward and backward together."""
    chance = torch.Generator().manual_seed(7)
    latents = torch.randn(2, unet.config.in_channels, 8, 8, generator=chance)
    states = torch.randn(2, 5, 32, generator=chance).requires_grad_(states_want_gradients)
    inputs = (latents, torch.tensor([3, 500]), *([states] if hasattr(unet.config, "cross_attention_dim") else []))
    runs: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: runs.update([name])

    blocks = [
        (name, module)
        for name, module in unet.named_modules()
        if name.rpartition(".")[0].endswith(tuple(block.rstrip(".") for block in BLOCKS))
    ]
    hooks = [module.register_forward_pre_hook(count(name)) for name, module in blocks]
    unet(*inputs).sample.square().mean().backward()
    for hook in hooks:
        hook.remove()
    found = {name: weight.grad for name, weight in unet.named_parameters() if weight.grad is not None}
    if states.grad is not None:
        found["states"] = states.grad
    return found, runs


@pytest.mark.parametrize(
    ("match", "first"),
    [
        ("unet.**.attn2.to_k", "down_blocks.0.attentions.0.transformer_blocks.0"),
        ("unet.mid_block.**.to_q", "mid_block.attentions.0.transformer_blocks.0"),
        ("unet.up_blocks.1.resnets.1.conv2", "up_blocks.1.resnets.1"),
        ("unet.conv_in", "down_blocks.0.resnets.0"),
    ],
)
def test_blocks_before_the_first_adapter_run_once(tiny_sd1_folder: Path, match: str, first: str) -> None:
    plain, once = _gradients(_network(tiny_sd1_folder, match))
    network: Any = _network(tiny_sd1_folder, match)
    checkpoint_unet(network)
    found, runs = _gradients(network)
    assert found.keys() == plain.keys() and found
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    order = list(once)  # as the forward pass comes to them
    assert set(once.values()) == {1}
    before = order.index(first)
    assert {name: runs[name] for name in order[:before]} == dict.fromkeys(order[:before], 1)
    later = [name for name in order[before:] if name != UNCHECKED]
    assert {name: runs[name] for name in later} == dict.fromkeys(later, 2)


def test_states_of_a_trained_text_encoder_need_the_blocks_that_see_them(tiny_sd1_folder: Path) -> None:
    match = "unet.up_blocks.1.resnets.1.conv2"
    plain, _ = _gradients(_network(tiny_sd1_folder, match), states_want_gradients=True)
    network: Any = _network(tiny_sd1_folder, match)
    checkpoint_unet(network)
    found, runs = _gradients(network, states_want_gradients=True)
    assert "states" in found and all(torch.equal(found[name], plain[name]) for name in plain)
    assert runs["down_blocks.0.resnets.0"] == 1  # in front of the first cross-attention
    assert runs["down_blocks.0.attentions.0.transformer_blocks.0"] == 2


def test_a_network_without_text(tiny_super_resolution_folder: Path) -> None:
    match = "unet.up_blocks.**.conv1"
    plain, once = _gradients(_network(tiny_super_resolution_folder, match))
    network: Any = _network(tiny_super_resolution_folder, match)
    checkpoint_unet(network)
    found, runs = _gradients(network)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert all(runs[name] == 1 + (not name.startswith(("down", "mid"))) for name in once)
