"""Random adapters for the tests of files, merging and drawing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from lora_kit.adapters import AdapterState, LoraUpdate, write_kohya
from lora_kit.adapters.state import weight_modules
from lora_kit.models import ModelBundle, load_bundle
from lora_kit.recipe import ModelSection
from lora_kit.targeting import ModuleInfo


def bundle_of(folder: Path, dtype: torch.dtype = torch.float32) -> ModelBundle:
    return load_bundle(ModelSection(base=str(folder)), dtype)


def in_blocks(module: ModuleInfo) -> bool:
    """What sd-scripts would pick: linear and convolution inside the UNet's blocks, and the text transformer."""
    return "_block" in module.name or ".layers." in module.name


def random_state(
    components: Mapping[str, nn.Module], seed: int = 0, wanted: Callable[[ModuleInfo], bool] = in_blocks
) -> AdapterState:
    """Updates of ranks 1 to 4 and alphas of their own; ΔW is about as large as the weights."""
    generator = torch.Generator().manual_seed(seed)
    updates: dict[str, LoraUpdate] = {}
    for index, module in enumerate(weight_modules(components).values()):
        if not wanted(module):
            continue
        rank = 1 + index % 4
        down = torch.randn(rank, *module.shape[1:], generator=generator)
        up = torch.randn(module.shape[0], rank, *(1 for _ in module.shape[2:]), generator=generator)
        updates[module.name] = LoraUpdate(down / down[0].numel() ** 0.5, 0.1 * up, 0.5 + index % 3)
    return AdapterState(updates, {})


def adapter_file(path: Path, components: Mapping[str, nn.Module], seed: int = 0) -> Path:
    """A kohya file with `random_state`."""
    write_kohya(path, random_state(components, seed))
    return path
