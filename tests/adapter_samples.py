"""Random adapters for the tests of files, merging and drawing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lora_kit.adapters import AdapterState, LoraUpdate, write_kohya
from lora_kit.adapters.state import adaptable_modules, weight_modules
from lora_kit.adapters.updates import Update, build_update
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


def dora_state(base: Path, seed: int = 0) -> AdapterState:
    """`random_state` with magnitudes of 1 to 1.1 times the adapted rows' norms."""
    bundle = bundle_of(base, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    updates: dict[str, Update] = {}
    for name, update in random_state(bundle.components, seed).updates.items():
        component, _, inner = name.partition(".")
        delta = update.weight_delta(1.0, None, torch.float64)
        assert isinstance(update, LoraUpdate)
        assert delta is not None
        norms = (bundle.components[component].get_parameter(f"{inner}.weight") + delta).detach().flatten(1).norm(dim=1)
        drawn = norms * (1 + 0.1 * torch.rand(norms.shape, generator=generator))
        updates[name] = replace(update, magnitude=drawn.float().reshape(-1, *(1 for _ in delta.shape[1:])))
    return AdapterState(updates, {})


def lycoris_state(components: Mapping[str, nn.Module], seed: int = 0) -> AdapterState:
    """One update of every method and variant, each on a module of its own that can hold it, in fp16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (0.2 * torch.randn(shape, generator=generator)).half()

    linears = iter([one for one in weight_modules(components).values() if ".attn1.to_" in one.name])
    convs = iter([one for one in weight_modules(components).values() if one.name.endswith(("conv1", "conv2"))])
    norm = next(one for one in adaptable_modules(components).values() if one.name.endswith("norm1"))
    found: dict[str, tuple[dict[str, torch.Tensor], float | None]] = {}
    for kind in _LINEAR:
        module = next(linears)
        out, inside = module.shape
        found[module.name] = _LINEAR[kind](draw, out, inside), 3.0
    for kind in _CONV:
        module = next(convs)
        found[module.name] = _CONV[kind](draw, *module.shape), 3.0
    found[norm.name] = {"w_norm": draw(*norm.shape), "b_norm": draw(*norm.shape)}, None
    modules = adaptable_modules(components)
    updates = {name: build_update(parts, alpha, modules[name].shape) for name, (parts, alpha) in found.items()}
    return AdapterState(updates, {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "x"}'})


Draw = Callable[..., torch.Tensor]
_LINEAR: dict[str, Callable[[Draw, int, int], dict[str, torch.Tensor]]] = {
    "lora": lambda draw, out, inside: {"down": draw(2, inside), "up": draw(out, 2)},
    "dora": lambda draw, out, inside: {"down": draw(2, inside), "up": draw(out, 2), "magnitude": 1 + draw(out, 1)},
    "loha": lambda draw, out, inside: {
        name: draw(out, 2) if name.endswith("a") else draw(2, inside)
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    },
    "lokr": lambda draw, out, inside: {
        "lokr_w1": draw(4, 4),
        "lokr_w2_a": draw(out // 4, 2),
        "lokr_w2_b": draw(2, inside // 4),
    },
    "full": lambda draw, out, inside: {"diff": draw(out, inside)},
    "oft": lambda draw, out, inside: {"oft_blocks": draw(4, out // 4, out // 4)},
    "boft": lambda draw, out, inside: {"oft_blocks": draw(2, out // 4, 4, 4)},
    "ia3": lambda draw, out, inside: {"weight": draw(inside), "on_input": torch.tensor(True)},
}
_CONV: dict[str, Callable[[Draw, int, int, int, int], dict[str, torch.Tensor]]] = {
    "locon": lambda draw, out, inside, *kernel: {"down": draw(2, inside, *kernel), "up": draw(out, 2, 1, 1)},
    "tucker": lambda draw, out, inside, *kernel: {
        "down": draw(2, inside, 1, 1),
        "up": draw(out, 2, 1, 1),
        "mid": draw(2, 2, *kernel),
    },
    "full": lambda draw, out, inside, *kernel: {"diff": draw(out, inside, *kernel), "diff_b": draw(out)},
}
