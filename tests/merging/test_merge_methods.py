"""Every method of adapter in the weights of a folder: W + ΔW with ΔW in float64, within the method's own rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_samples import adapter_file, bundle_of, random_state
from merge_samples import networks_of, random_checkpoint, weights_of
from safetensors.torch import save_file
from torch import Tensor

from lora_kit.adapters import AdapterState, Update
from lora_kit.adapters.updates import build_update
from lora_kit.errors import AdapterFileError
from lora_kit.merging import MergeOptions, merge, plan_merge

LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "unet.mid_block.resnets.0.conv1"
NORM = "unet.down_blocks.0.resnets.0.norm1"
SCALE = 0.7
Shape = tuple[int, ...]
Parts = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pair(shape: Shape, rank: int = 2) -> Parts:
    return {"down": random(rank, *shape[1:]), "up": random(shape[0], rank, *(1 for _ in shape[2:]))}


def loha(shape: Shape) -> Parts:
    out, inner = shape[0], math.prod(shape[1:])
    names = {"w1_a": (out, 2), "w1_b": (2, inner), "w2_a": (out, 2), "w2_b": (2, inner)}
    return {f"hada_{name}": random(*size) for name, size in names.items()}


def magnitude(shape: Shape) -> Parts:
    return {"magnitude": random(shape[0], *(1 for _ in shape[1:])).abs() + 0.5}


def glora(out: int, inner: int) -> Parts:
    return {"a1": random(inner, 2), "a2": random(2, inner), "b1": random(out, 2), "b2": random(2, inner)}


METHODS: dict[str, Callable[[Shape], Parts]] = {
    "lora": pair,
    "dora": lambda shape: {**pair(shape), **magnitude(shape)},
    "loha": loha,
    "loha with magnitude": lambda shape: {**loha(shape), **magnitude(shape)},
    "lokr": lambda shape: {"lokr_w1": random(4, 4), "lokr_w2": random(shape[0] // 4, shape[1] // 4, *shape[2:])},
    "full": lambda shape: {"diff": random(*shape), "diff_b": random(shape[0])},
    "oft": lambda shape: {"oft_blocks": random(shape[0] // 4, 4, 4)},
    "boft": lambda shape: {"oft_blocks": random(2, shape[0] // 4, 4, 4)},
    "glora": lambda shape: glora(*shape),
    "ia3": lambda shape: {"weight": random(shape[1]), "on_input": torch.ones(1)},
    "tucker": lambda shape: {**pair((*shape[:2], 1, 1)), "mid": random(2, 2, *shape[2:])},
}
NOT_THESE = {("tucker", LINEAR), ("glora", CONV)}
CASES = [(method, module) for method in METHODS for module in (LINEAR, CONV) if (method, module) not in NOT_THESE]


@pytest.fixture
def weights(tiny_sd1_folder: Path) -> dict[str, Tensor]:
    return weights_of(bundle_of(tiny_sd1_folder).components)


def update_of(method: str, shape: Shape) -> Update:
    alpha = None if method in ("full", "ia3", "oft", "boft") else 1.5
    return build_update(METHODS[method](shape), alpha, shape)


def assert_merged(folder: Path, before: dict[str, Tensor], name: str, updates: list[tuple[Update, float]]) -> None:
    after = weights_of(bundle_of(folder).components)
    weight = before[f"{name}.weight"].double()
    wanted, bound, size = weight.clone(), torch.zeros_like(weight), weight.abs()
    for update, scale in updates:
        delta = update.weight_delta(scale, weight, torch.float64)
        assert delta is not None
        assert bool(delta.abs().max() > 1e-3)
        wanted, size = wanted + delta, size + delta.abs()
        # Factors instead of a product at the scale: one rounding more of each.
        bound = bound + update.rounding(scale, weight) * 2
    allowed = bound + (len(updates) + 2) * 2**-24 * size
    assert bool(((after[f"{name}.weight"].double() - wanted).abs() <= allowed).all())
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed <= {f"{name}.weight", f"{name}.bias"}


@pytest.mark.parametrize(("method", "module"), CASES)
def test_each_method_adds_its_own_delta(tiny_sd1_folder, tmp_path, weights, method, module):
    update = update_of(method, tuple(weights[f"{module}.weight"].shape))
    report = merge(tiny_sd1_folder, [(AdapterState({module: update}, {}), SCALE)], tmp_path / "out")
    assert_merged(tmp_path / "out", weights, module, [(update, SCALE)])
    assert report.weights is not None
    assert report.weights.worst <= 1


def test_biases_and_norms_change_too(tiny_sd1_folder, tmp_path, weights):
    size = weights[f"{NORM}.weight"].shape[0]
    norm = build_update({"w_norm": random(size), "b_norm": random(size)}, None, (size,))
    full = update_of("full", tuple(weights[f"{CONV}.weight"].shape))
    state = AdapterState({NORM: norm, CONV: full}, {})
    merge(tiny_sd1_folder, [(state, SCALE)], tmp_path / "out")
    after = weights_of(bundle_of(tmp_path / "out").components)
    expected = {f"{NORM}.weight": norm.weight_delta(SCALE), f"{NORM}.bias": norm.bias_delta(SCALE),
                f"{CONV}.weight": full.weight_delta(SCALE), f"{CONV}.bias": full.bias_delta(SCALE)}  # fmt: skip
    for name, delta in expected.items():
        assert delta is not None
        torch.testing.assert_close(after[name], weights[name] + delta, rtol=0, atol=0)
    assert {name for name in after if not torch.equal(after[name], weights[name])} == set(expected)
    plan = plan_merge(tiny_sd1_folder, [(state, SCALE)])
    assert {(change.module, change.kind) for change in plan.changes} == {
        (module, kind) for module in (NORM, CONV) for kind in ("weight", "bias")
    }


def test_several_methods_on_one_module_add_up_over_the_original_weight(tiny_sd1_folder, tmp_path, weights):
    shape = tuple(weights[f"{CONV}.weight"].shape)
    updates = [(update_of(method, shape), scale) for method, scale in (("lora", 0.5), ("dora", 0.8), ("oft", -0.3))]
    adapters = [(AdapterState({CONV: update}, {}), scale) for update, scale in updates]
    merge(tiny_sd1_folder, adapters, tmp_path / "out")
    assert_merged(tmp_path / "out", weights, CONV, updates)


@pytest.mark.parametrize("method", ["dora", "oft", "boft", "ia3"])
def test_what_depends_on_the_weight_cannot_be_unmerged(tiny_sd1_folder, tmp_path, weights, method):
    update = update_of(method, tuple(weights[f"{LINEAR}.weight"].shape))
    with pytest.raises(AdapterFileError, match=r"cannot be un-merged, as its ΔW .* depends on the weight"):
        merge(tiny_sd1_folder, [(AdapterState({LINEAR: update}, {}), 1.0)], tmp_path / "o", MergeOptions(unmerge=True))


def test_a_bias_that_the_base_lacks(tiny_sd1_folder, tmp_path, weights):
    module = LINEAR.replace("to_out.0", "to_q")
    update = update_of("full", tuple(weights[f"{module}.weight"].shape))
    with pytest.raises(AdapterFileError, match=r"changes biases that .* does not have: unet.*to_q"):
        merge(tiny_sd1_folder, [(AdapterState({module: update}, {}), 1.0)], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_packed_rows_take_methods_that_need_their_weight(tmp_path):
    """OpenCLIP's q, k and v lie in one tensor: a method must see its own third of it, and only that."""
    base = tmp_path / "sd2.safetensors"
    save_file(random_checkpoint(2), base)
    before = weights_of(networks_of(base))
    names = [f"text_encoder.encoder.layers.0.self_attn.{part}_proj" for part in "qkv"]
    update = {name: update_of("dora", tuple(before[f"{name}.weight"].shape)) for name in names[1:]}
    merge(base, [(AdapterState(dict(update), {}), SCALE)], tmp_path / "out.safetensors")
    after = weights_of(networks_of(tmp_path / "out.safetensors"))
    for name, one in update.items():
        weight = before[f"{name}.weight"].double()
        delta = one.weight_delta(SCALE, weight, torch.float64)
        assert delta is not None
        allowed = one.rounding(SCALE, weight) + 2 * 2**-24 * (weight.abs() + delta.abs())
        assert bool(((after[f"{name}.weight"].double() - weight - delta).abs() <= allowed).all())
    assert torch.equal(after[f"{names[0]}.weight"], before[f"{names[0]}.weight"])


def test_the_network_with_any_methods_live_is_the_merged_one(tiny_sd1_folder, tmp_path, weights):
    shapes = {module: tuple(weights[f"{module}.weight"].shape) for module in (LINEAR, CONV)}
    first = AdapterState({LINEAR: update_of("loha", shapes[LINEAR]), CONV: update_of("full", shapes[CONV])}, {})
    second = AdapterState({LINEAR: update_of("lora", shapes[LINEAR]), CONV: update_of("dora", shapes[CONV])}, {})
    options = MergeOptions(verify_network=True)
    (error,) = merge(tiny_sd1_folder, [(first, 0.5), (second, 0.4)], tmp_path / "out", options).networks
    # fp32 rounding through some dozen layers.
    assert max(error[1:]) < 1e-5


def test_two_adapters_of_one_file_are_twice_its_update(tiny_sd1_folder, tmp_path, weights):
    path = adapter_file(tmp_path / "a.safetensors", bundle_of(tiny_sd1_folder).components)
    merge(tiny_sd1_folder, [(path, 0.5), (path, 0.5)], tmp_path / "twice")
    merge(tiny_sd1_folder, [(path, 1.0)], tmp_path / "once")
    once, twice = (weights_of(bundle_of(tmp_path / name).components) for name in ("once", "twice"))
    updates = random_state(bundle_of(tiny_sd1_folder).components).updates
    for name, weight in once.items():
        if name.removesuffix(".weight") in updates:
            # The same sum in another order.
            assert float((weight - twice[name]).abs().max()) <= 16 * 2**-24 * float(weight.abs().max() + 1)
        else:
            assert torch.equal(weight, twice[name])
