"""Single-file bases, adapters for them, and merging written a second time: for every module, in float64."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from ldm_reference import Size, checkpoint_shapes, small
from safetensors.torch import load_file
from small_tokenizers import small_tokenizer
from torch import Tensor, nn

from lora_kit.adapters import AdapterState
from lora_kit.models.loading import open_layout
from lora_kit.recipe import ModelSection


def random_checkpoint(size: Size | int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights, each different, in the LDM layout. size: or 1 or 2 for the small ones."""
    size = small(size, len(small_tokenizer())) if isinstance(size, int) else size
    state: dict[str, Tensor] = {}
    for name, shape in checkpoint_shapes(size).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        state[name] = (torch.randn(shape, generator=generator) * 0.05).to(dtype)
    return state


def networks_of(base: Path) -> dict[str, nn.Module]:
    """UNet and text encoder of a folder or a single file, through diffusers and transformers, in fp32."""
    with open_layout(ModelSection(base=str(base), prediction_type="epsilon")) as layout:
        return {"unet": layout.unet(torch.float32), "text_encoder": layout.text_encoder(torch.float32)}


def weights_of(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every parameter under dotted names without `text_model`."""
    return {
        f"{component}.{name.removeprefix('text_model.')}": weight
        for component, network in networks.items()
        for name, weight in network.state_dict().items()
    }


def expected_weights(
    before: Mapping[str, Tensor], adapters: list[tuple[AdapterState, float]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(W + Σ scale · alpha / r · up · down in float64, the magnitudes that rounding is measured against)."""
    wanted = {name: weight.double() for name, weight in before.items()}
    sizes = {name: weight.abs() for name, weight in wanted.items()}
    for state, scale in adapters:
        for module, update in state.updates.items():
            name = f"{module}.weight"
            up, down = update.up.double().flatten(1), update.down.double().flatten(1)
            factor = scale * update.alpha / len(down)
            wanted[name] = wanted[name] + factor * (up @ down).view_as(wanted[name])
            sizes[name] = sizes[name] + abs(factor) * (up.abs() @ down.abs()).view_as(wanted[name])
    return wanted, sizes


def assert_within_rounding(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], sizes: Mapping[str, Tensor]
) -> None:
    """fp32: at most a dozen roundings of terms whose magnitudes sum to `sizes` (ranks of a few, two adapters)."""
    assert got.keys() == wanted.keys()
    for name, weight in got.items():
        assert bool(((weight.double() - wanted[name]).abs() <= 12 * 2**-24 * sizes[name]).all()), name


def changed_keys(before: Path, after: Path) -> set[str]:
    """Keys whose bytes differ."""
    old, new = load_file(before), load_file(after)
    assert old.keys() == new.keys()
    return {key for key in old if not torch.equal(old[key].view(-1), new[key].view(-1))}
