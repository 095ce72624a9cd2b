"""Live adapters into the weights and out again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from adapter_samples import adapter_file, bundle_of
from live_samples import dense_updates, digests, lora_updates, picture, small_net, snapshot, turned_updates
from torch import Tensor, nn

from lora_kit.adapters import LoraUpdate, eject, fuse, inject, load_adapter, set_scale, unfuse
from lora_kit.errors import TargetError
from lora_kit.models import pipeline
from lora_kit.recipe import TargetRule
from lora_kit.targeting import make_plan, module_tree

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def adapted(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """Three methods live on the same modules, each with strengths of its own per block."""
    net = small_net()
    net["unet"].to(dtype)
    load_adapter(net, lora_updates(net), "style")
    load_adapter(net, dense_updates(net, 1), "face")
    load_adapter(net, turned_updates(net, 2), "turn")
    set_scale(net, {"style": {"unet.**": 0.5, "unet.up_blocks.**": -0.25}, "face": 0.3, "turn": {"unet.proj": 0}})
    return net


def run(net: dict[str, nn.Module]) -> Tensor:
    with torch.no_grad():
        return net["unet"](picture().to(next(net["unet"].parameters()).dtype))


@pytest.mark.parametrize("keep", ["cpu", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unfuse_brings_every_bit_and_every_object_back(dtype: torch.dtype, keep: str) -> None:
    bare = small_net()
    bare["unet"].to(dtype)
    net = adapted(dtype)
    before, bits, live = snapshot(net), digests(net), run(net)
    report = fuse(net, keep=keep)
    assert digests(net).keys() == digests(bare).keys(), "fused, the network is a plain one"
    assert all(digests(net)[name] != digest for name, digest in digests(bare).items())
    assert report.parameters == len(digests(bare))
    assert (report.kept_bytes > 0) == (keep == "cpu")
    unfuse(net, bare if keep == "none" else None)
    assert digests(net) == bits
    assert snapshot(net) == before
    assert torch.equal(run(net), live)
    for name in ("turn", "face", "style"):
        eject(net, name)
    assert digests(net) == digests(bare)


def test_the_kept_bytes_are_those_of_the_changed_parameters() -> None:
    net = small_net()
    load_adapter(net, {"unet.proj": lora_updates(net)["unet.proj"]}, "style")
    assert fuse(net) == (1, 4 * 6 * 4)


def test_fused_is_the_networks_own_modules_and_parameters() -> None:
    net = small_net()
    before = snapshot(net)
    load_adapter(net, dense_updates(net), "style")
    load_adapter(net, lora_updates(net), "other")
    fuse(net)
    modules, parameters = snapshot(net)
    assert [module[:4] for module in modules] == [module[:4] for module in before[0]]
    assert parameters == before[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["conv_in", "down_blocks.0", "up_blocks.0", "up_blocks.1", "proj"])
def test_fused_equals_live_within_rounding(name: str, dtype: torch.dtype) -> None:
    net = small_net()
    net["unet"].to(dtype)
    module, update = net["unet"].get_submodule(name), lora_updates(net)[f"unet.{name}"]
    assert isinstance(update, LoraUpdate)
    weight, delta = module.weight.double(), update.weight_delta(0.7, None, torch.float64)
    size = weight[0].numel()
    shape = (3, 8, 8, 8) if weight.ndim == 4 else (3, weight.shape[1])
    x = torch.randn(3, weight.shape[1], *shape[2:], generator=torch.Generator().manual_seed(3)).to(dtype)
    load_adapter(net, {f"unet.{name}": update}, "style")
    set_scale(net, {"style": 0.7})
    live = net["unet"].get_submodule(name)(x)
    fuse(net)
    fused = net["unet"].get_submodule(name)(x)
    assert fused.dtype == live.dtype == dtype
    magnitude = LoraUpdate(update.down.abs(), update.up.abs(), update.alpha).weight_delta(0.7, None, torch.float64)
    twin = copy.deepcopy(module).double()
    twin.weight.data = weight.abs() + magnitude.view_as(weight)
    if twin.bias is not None:
        twin.bias.data = twin.bias.abs()
    # What is added up, in absolute values: |x|·(|W| + |s·up|·|down|) + |b|. The fused weight is cast once and the
    # output once (2u); live, the base's output is cast and then the sum (2u). Sums in fp32 of `size` and rank terms
    # each way: (size + rank + 4) · 2^-24 (Higham 2002, section 3.1). bf16 and fp16 kernels that sum in their own
    # precision would be beyond it.
    cast = torch.finfo(dtype).eps / 2
    bound = (4 * cast + 2 * (size + update.rank + 4) * 2.0**-24) * twin(x.double().abs())
    error = (fused.double() - live.double()).abs()
    assert bool((error <= bound).all()), float((error / bound).max())
    twin.weight.data = weight + delta.view_as(weight)
    twin.bias = module.bias if module.bias is None else nn.Parameter(module.bias.double())
    assert bool(((fused.double() - twin(x.double())).abs() <= bound).all())


def test_a_weight_that_only_delta_layers_change_is_fused_to_the_bit() -> None:
    net = small_net()
    load_adapter(net, turned_updates(net), "turn")
    live = run(net)
    fuse(net)
    assert torch.equal(run(net), live)


def test_fused_adapters_cannot_be_touched() -> None:
    net = adapted()
    fuse(net)
    plan = make_plan([TargetRule.model_validate({"match": "unet.proj", "rank": 2})], module_tree(net))
    for touch in (
        lambda: fuse(net),
        lambda: set_scale(net, {"style": 0}),
        lambda: eject(net, "style"),
        lambda: load_adapter(net, lora_updates(net), "new"),
        lambda: inject(net, plan, "new"),
    ):
        with pytest.raises(TargetError, match=r"fused into the weights \(style, face, turn\); call unfuse first"):
            touch()
    unfuse(net)
    with pytest.raises(TargetError, match="nothing is fused"):
        unfuse(net)


def test_without_kept_originals_only_the_same_base_will_do() -> None:
    net = adapted()
    fuse(net, keep="none")
    fused = digests(net)
    with pytest.raises(TargetError, match="pass base="):
        unfuse(net)
    with pytest.raises(TargetError, match=r"9 parameters are not the ones.*unet\.conv_in\.weight"):
        unfuse(net, small_net(seed=9))
    with pytest.raises(TargetError, match="are not the ones"):
        unfuse(net, adapted())
    assert digests(net) == fused
    unfuse(net, small_net())


def test_flags_and_modes_are_left_alone() -> None:
    net = small_net()
    net["unet"].train()
    net["unet"].get_submodule("norm").requires_grad_(True)
    load_adapter(net, lora_updates(net), "style")
    live = [(weight.requires_grad, id(weight)) for weight in net["unet"].parameters()]
    fuse(net)
    assert all(module.training for module in net["unet"].modules())
    net["unet"].eval()
    unfuse(net)
    assert not any(module.training for module in net["unet"].modules())
    assert [(weight.requires_grad, id(weight)) for weight in net["unet"].parameters()] == live
    eject(net, "style")
    assert [weight.requires_grad for weight in net["unet"].get_submodule("norm").parameters()] == [True, True]


def test_a_network_that_was_cast_while_fused_gets_the_base_as_cast() -> None:
    net, bare = adapted(), small_net()
    fuse(net)
    net["unet"].to(torch.bfloat16)
    unfuse(net)
    for name in ("style", "face", "turn"):
        eject(net, name)
    assert digests(net) == digests({"unet": bare["unet"].to(torch.bfloat16)})


def test_a_copy_of_a_fused_network_is_unfused_on_its_own() -> None:
    net = adapted()
    bits = digests(net)
    fuse(net)
    twin = copy.deepcopy(net)
    fused = digests(net)
    unfuse(twin)
    assert digests(twin) == bits
    assert digests(net) == fused


def test_overflow_is_told_before_anything_changes() -> None:
    net = small_net()
    net["unet"].half()
    load_adapter(net, lora_updates(net), "style")
    set_scale(net, {"style": {"unet.**": 1, "unet.proj": 1e6}})
    before = digests(net)
    with pytest.raises(TargetError, match=r"1 parameters .*do not fit into fp16 \(unet\.proj\.weight\)"):
        fuse(net)
    assert digests(net) == before
    set_scale(net, {"style": 1})
    fuse(net)


def test_there_must_be_something_to_fuse() -> None:
    with pytest.raises(TargetError, match="there is no adapter to fuse"):
        fuse(small_net())
    net = adapted()
    with pytest.raises(TargetError, match="keep: got 'gpu'"):
        fuse(net, keep="gpu")


def test_a_pipeline_is_fused_and_restored(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    bundle = bundle_of(tiny_sd1_folder)
    pipe = pipeline(bundle)
    bits = digests(bundle.components)
    for seed, name in enumerate(("style", "face")):
        load_adapter(pipe, adapter_file(tmp_path / f"{name}.safetensors", bundle.components, seed), name)
    set_scale(pipe, {"style": {"unet.**": 0.2, "unet.up_blocks.**": 0.1}, "face": 0.1})

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe("red apple", num_inference_steps=2, generator=generator, output_type="np").images)

    live = draw()
    fuse(pipe)
    assert digests(bundle.components).keys() == bits.keys()
    # The same fp32 sums in another order through two steps of the whole pipeline; wrong weights are far off.
    assert float((draw() - live).abs().max()) < 1e-3
    unfuse(pipe)
    assert torch.equal(draw(), live)
    eject(pipe, "style")
    eject(pipe, "face")
    assert digests(bundle.components) == bits
    assert float((draw() - live).abs().max()) > 1e-2, "the adapters change the picture"
