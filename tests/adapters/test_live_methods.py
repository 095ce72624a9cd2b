"""Every method of the neutral form, live in a whole small Stable Diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import bundle_of, in_blocks
from live_samples import digests, snapshot
from torch import Tensor, nn

from lora_kit.adapters import (
    AdapterState,
    Update,
    eject,
    fuse,
    load_adapter,
    read_adapter,
    set_scale,
    unfuse,
    write_kohya,
)
from lora_kit.adapters.layers import live_layers
from lora_kit.adapters.state import adaptable_modules, is_plain_lora
from lora_kit.adapters.updates import build_update
from lora_kit.models import ModelBundle
from lora_kit.targeting import ModuleInfo

Draw = Callable[..., Tensor]
Shape = tuple[int, ...]


def drawn(generator: torch.Generator) -> Draw:
    def draw(*shape: int, size: float = 0.3) -> Tensor:
        return size * torch.randn(shape, generator=generator)

    return draw


def lora(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    return {"down": draw(2, *shape[1:]), "up": draw(shape[0], 2, *(1 for _ in shape[2:]))}


def tucker(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    if len(shape) == 2:
        return lora(shape, draw)
    return {"down": draw(2, shape[1], 1, 1), "up": draw(shape[0], 2, 1, 1), "mid": draw(2, 2, *shape[2:])}


def dora(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    return lora(shape, draw) | {"magnitude": 1 + draw(shape[0], *(1 for _ in shape[1:]))}


def loha(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    a, b = (shape[0], 2), (2, math.prod(shape[1:]))
    return {"hada_w1_a": draw(*a), "hada_w1_b": draw(*b), "hada_w2_a": draw(*a), "hada_w2_b": draw(*b)}


def lokr(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    return {"lokr_w1": draw(2, 2), "lokr_w2": draw(shape[0] // 2, shape[1] // 2, *shape[2:])}


def full(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    return {"diff": draw(*shape)}


def norm(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    return {"w_norm": draw(*shape), "b_norm": draw(*shape)}


def oft(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    return {"oft_blocks": draw(shape[0] // 4, 4, 4), "rescale": 1 + draw(shape[0], *(1 for _ in shape[1:]))}


def boft(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    return {"oft_blocks": draw(2, shape[0] // 4, 4, 4)}


def glora(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    ones = [1] * len(shape[2:])
    return {
        "a1": draw(shape[1], 2, *ones),
        "a2": draw(2, shape[1], *ones),
        "b1": draw(shape[0], 2, *ones),
        "b2": draw(2, *shape[1:]),
    }


def ia3(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    size = (shape[0],) if len(shape) == 2 else (1, shape[0], 1, 1)
    return {"weight": draw(*size), "on_input": torch.tensor(0.0)}


METHODS = (lora, tucker, dora, loha, lokr, full, norm, oft, boft, glora, ia3)


def chosen(module: ModuleInfo, make: Callable[..., Any]) -> bool:
    if make is norm:
        return len(module.shape) == 1
    fits = len(module.shape) in (2, 4) and module.shape[0] % 8 == 0 and module.shape[1] % 2 == 0
    return fits and in_blocks(module) and "embeddings" not in module.name


def state_of(components: Mapping[str, nn.Module], make: Callable[..., Any], seed: int = 0) -> AdapterState:
    draw = drawn(torch.Generator().manual_seed(seed))
    updates: dict[str, Update] = {}
    for name, module in adaptable_modules(components).items():
        if chosen(module, make):
            alpha = None if make in (full, norm, oft, boft, ia3) else 1.0
            updates[name] = build_update(make(module.shape, draw), alpha, module.shape)
    return AdapterState(updates, {})


def outputs(bundle: ModelBundle) -> tuple[Tensor, Tensor]:
    """Of both networks on fixed inputs, in their own precision."""
    generator = torch.Generator().manual_seed(1)
    unet, text_encoder = (bundle.components[name] for name in ("unet", "text_encoder"))
    dtype = next(unet.parameters()).dtype
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    states = torch.randn(2, 77, 32, generator=generator).to(dtype)
    ids = torch.randint(20, (2, 77), generator=generator)
    with torch.no_grad():
        noise = unet(latents, torch.tensor([100, 800]), states).sample
        return noise, text_encoder(ids).last_hidden_state


def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> list[bool]:
    return [torch.equal(*pair) for pair in zip(a, b, strict=True)]


@pytest.mark.parametrize("make", METHODS)
def test_live_is_merged_and_comes_off_again(make: Callable[..., Any], tiny_sd1_folder: Path, tmp_path: Path) -> None:
    bundle = bundle_of(tiny_sd1_folder)
    base, before, bits = outputs(bundle), snapshot(bundle.components), digests(bundle.components)
    state = state_of(bundle.components, make)
    write_kohya(tmp_path / "a.safetensors", state)
    read = load_adapter(bundle, tmp_path / "a.safetensors", "style")
    assert read.updates.keys() == state.updates.keys() == live_layers(bundle.components).keys()
    live = outputs(bundle)
    assert equal(live, base) == [False, False]
    set_scale(bundle, {"style": 0})
    assert equal(outputs(bundle), base) == [True, True]
    set_scale(bundle, {"style": 0.7})
    live = outputs(bundle)
    eject(bundle, "style")
    assert snapshot(bundle.components) == before
    assert digests(bundle.components) == bits
    with torch.no_grad():
        add(bundle, {0.7: read})
    merged = outputs(bundle)
    if not any(is_plain_lora(update) for update in read.updates.values()):
        assert equal(merged, live) == [True, True], "the same sums in fp32, cast to the same weights"
    for got, expected in zip(live, merged, strict=True):
        # PEFT sums in another order: some hundred terms a layer, some tens of layers; below 2^12 units of 2^-24.
        torch.testing.assert_close(got, expected, rtol=0, atol=float(expected.abs().max()) * 2.0**-12)


def add(bundle: ModelBundle, adapters: Mapping[float, AdapterState]) -> None:
    """W + Σ ΔW(W) in place, without any layer."""
    totals: dict[str, list[Tensor]] = {}
    for scale, state in adapters.items():
        for name, update in state.updates.items():
            component, _, inner = name.partition(".")
            module: Any = bundle.components[component].get_submodule(inner)
            weight, bias = update.weight_delta(scale, module.weight), update.bias_delta(scale, module.bias)
            totals.setdefault(f"{name}.weight", []).extend([] if weight is None else [weight])
            totals.setdefault(f"{name}.bias", []).extend([] if bias is None else [bias])
    for name, deltas in totals.items():
        component, _, inner = name.partition(".")
        if deltas:
            parameter = bundle.components[component].get_parameter(inner)
            parameter += torch.stack([delta.view(parameter.shape) for delta in deltas]).sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_methods_at_once_are_fused_and_restored(dtype: torch.dtype, tiny_sd1_folder: Path) -> None:
    bundle = bundle_of(tiny_sd1_folder, dtype)
    base, bits = outputs(bundle), digests(bundle.components)
    scales: dict[str, Any] = {}
    for seed, make in enumerate(METHODS):
        load_adapter(bundle, state_of(bundle.components, make, seed), make.__name__)
        scales[make.__name__] = {"**": 0.05, "unet.up_blocks.**": -0.1} if make is not norm else 0.3
    set_scale(bundle, scales)
    live = outputs(bundle)
    assert equal(live, base) == [False, False]
    fuse(bundle)
    for got, expected in zip(outputs(bundle), live, strict=True):
        # Each layer's output is cast once more where PEFT adds to it: a few units of the dtype's precision in each
        # of some tens of layers.
        limit = 64 * torch.finfo(dtype).eps * float(expected.abs().max())
        assert float((got - expected).abs().max()) < limit
    unfuse(bundle)
    assert equal(outputs(bundle), live) == [True, True]
    set_scale(bundle, {})
    assert equal(outputs(bundle), base) == [True, True]
    for make in METHODS:
        eject(bundle, make.__name__)
    assert digests(bundle.components) == bits


def test_read_adapter_sees_through_live_layers(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    bundle = bundle_of(tiny_sd1_folder)
    write_kohya(tmp_path / "a.safetensors", state_of(bundle.components, oft))
    first = load_adapter(bundle, tmp_path / "a.safetensors", "one")
    assert read_adapter(tmp_path / "a.safetensors", bundle.components).updates.keys() == first.updates.keys()
