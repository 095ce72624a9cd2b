"""Adapters of methods other than plain LoRA, live."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from live_samples import (
    Dense,
    dense_updates,
    digests,
    lora_updates,
    picture,
    small_net,
    snapshot,
    turned_updates,
)
from torch import Tensor, nn

from lora_kit.adapters import Update, eject, inject, load_adapter, set_scale
from lora_kit.adapters.delta_layer import DeltaLayer
from lora_kit.errors import AdapterFileError, TargetError
from lora_kit.recipe import TargetRule
from lora_kit.targeting import make_plan, module_tree


@pytest.fixture
def net() -> dict[str, nn.Module]:
    return small_net()


def run(net: Mapping[str, nn.Module], x: Tensor | None = None) -> Tensor:
    weight = next(net["unet"].parameters())
    with torch.no_grad():
        return net["unet"]((picture() if x is None else x).to(weight.dtype))


def merged(adapters: Mapping[float, Mapping[str, Update]]) -> nn.Module:
    """The same network with W + Σ ΔW in its weights, in float64."""
    (network,) = small_net().values()
    network.double()
    original = copy.deepcopy(network)
    for scale, updates in adapters.items():
        for name, update in updates.items():
            module, before = (one.get_submodule(name.removeprefix("unet.")) for one in (network, original))
            delta = update.weight_delta(scale, before.weight, torch.float64)
            bias = update.bias_delta(scale, before.bias, torch.float64)
            module.weight += 0 if delta is None else delta.view(module.weight.shape)
            if bias is not None:
                module.bias += bias
    return network


@pytest.mark.parametrize("make", [dense_updates, turned_updates])
@pytest.mark.parametrize("scale", [1.0, 0.7, -0.5])
def test_the_output_is_the_merged_networks(make, scale: float, net: dict[str, nn.Module]) -> None:
    net["unet"].double()
    updates = make(net)
    load_adapter(net, updates, "style")
    set_scale(net, {"style": scale})
    # The same operations on the same float64 weights.
    torch.testing.assert_close(run(net), merged({scale: updates})(picture().double()), rtol=0, atol=1e-12)


def test_all_methods_on_the_same_modules_add_up(net: dict[str, nn.Module]) -> None:
    net["unet"].double()
    lora, dense, turned = lora_updates(net), dense_updates(net, 1), turned_updates(net, 2)
    for name, updates in (("lora", lora), ("dense", dense), ("turned", turned)):
        load_adapter(net, updates, name)
    for layer in net["unet"].modules():
        if hasattr(layer, "lora_A"):
            layer.lora_A.double()
            layer.lora_B.double()
    set_scale(net, {"lora": 0.5, "dense": -0.3, "turned": 0.9})
    expected = merged({0.5: lora, -0.3: dense, 0.9: turned})(picture().double())
    # PEFT adds up(down(x)) to W'x: sums of under 100 terms of order 1 in another order, through five layers.
    torch.testing.assert_close(run(net), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [("lora", "dense"), ("dense", "lora")])
def test_layers_go_over_each_other_in_any_order_and_come_off_again(
    order: tuple[str, str], net: dict[str, nn.Module]
) -> None:
    before, bits = snapshot(net), digests(net)
    updates = {"lora": lora_updates(net), "dense": dense_updates(net)}
    for name in order:
        load_adapter(net, updates[name], name)
    both = run(net)
    eject(net, order[0])
    alone = run(net)
    load_adapter(net, updates[order[0]], order[0])
    # W' is computed alike; PEFT's part is added to it whatever came first.
    assert torch.equal(run(net), both)
    assert not torch.equal(alone, both)
    for name in reversed(order):
        eject(net, name)
    assert snapshot(net) == before
    assert digests(net) == bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strength_zero_is_the_base_bit_for_bit(dtype: torch.dtype, net: dict[str, nn.Module]) -> None:
    net["unet"].to(dtype)
    base = run(net)
    load_adapter(net, dense_updates(net), "dense")
    load_adapter(net, lora_updates(net), "lora")
    assert not torch.equal(run(net), base)
    set_scale(net, {"dense": 0, "lora": 0.0})
    assert torch.equal(run(net), base)
    set_scale(net, {})
    assert torch.equal(run(net), base)


def test_the_weight_is_cast_once(net: dict[str, nn.Module]) -> None:
    net["unet"].to(torch.bfloat16)
    weight = net["unet"].get_submodule("proj").weight.clone()
    delta = torch.full(weight.shape, 2.0**-6)
    load_adapter(net, {"unet.proj": Dense(delta)}, "style")
    x = torch.eye(6, dtype=torch.bfloat16)
    got = net["unet"].get_submodule("proj")(x).T
    # A row of the unit matrix picks one weight, so nothing but the cast rounds.
    assert torch.equal(got, (weight.float() + delta).to(torch.bfloat16))


def test_a_changed_base_weight_is_noticed(net: dict[str, nn.Module]) -> None:
    updates = dense_updates(net)
    load_adapter(net, updates, "style")
    run(net)
    other = small_net(seed=5)
    base_only = {name.replace(".base_layer", ""): weight for name, weight in net["unet"].state_dict().items()}
    assert base_only.keys() == other["unet"].state_dict().keys()
    with torch.no_grad():
        for name, weight in net["unet"].named_parameters():
            weight.copy_(other["unet"].get_parameter(name.replace(".base_layer", "")))
    load_adapter(other, updates, "style")
    assert torch.equal(run(net), run(other))
    for network in (net["unet"], other["unet"]):
        network.to(torch.bfloat16)
    assert torch.equal(run(net), run(other))
    assert run(net).dtype == torch.bfloat16


def test_autocast_does_not_reach_the_arithmetic(net: dict[str, nn.Module]) -> None:
    load_adapter(net, turned_updates(net), "style")
    with torch.autocast("cpu", torch.bfloat16):
        run(net)
    inside = run(net)
    twin = small_net()
    load_adapter(twin, turned_updates(twin), "style")
    assert torch.equal(inside, run(twin))


def test_what_inference_mode_computed_can_be_trained_over(net: dict[str, nn.Module]) -> None:
    load_adapter(net, dense_updates(net), "style")
    with torch.inference_mode():
        net["unet"](picture())
    x = picture().requires_grad_(True)
    net["unet"](x).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


def test_a_lora_trains_over_another_method(net: dict[str, nn.Module]) -> None:
    load_adapter(net, dense_updates(net), "style")
    plan = make_plan([TargetRule.model_validate({"match": "unet.**", "rank": 2})], module_tree(net))
    before = run(net)
    trainable = inject(net, plan, "trained")
    assert torch.equal(run(net), before)
    net["unet"](picture()).sum().backward()
    assert all(bool(up.grad.abs().sum() > 0) for _, up in trainable.values())


def test_a_copy_has_its_own_adapters(net: dict[str, nn.Module]) -> None:
    base = run(net)
    load_adapter(net, dense_updates(net), "style")
    twin = copy.deepcopy(net)
    live = run(net)
    eject(twin, "style")
    assert torch.equal(run(twin), base)
    assert torch.equal(run(net), live)
    assert not any(isinstance(module, DeltaLayer) for module in twin["unet"].modules())


def test_updates_are_no_part_of_the_networks_weights(net: dict[str, nn.Module]) -> None:
    count = len(list(net["unet"].parameters()))
    load_adapter(net, dense_updates(net), "style")
    run(net)
    assert len(list(net["unet"].parameters())) == count


def test_everything_that_does_not_fit_is_told_and_nothing_is_changed(net: dict[str, nn.Module]) -> None:
    before = snapshot(net)
    updates = {
        "unet.proj": Dense(torch.zeros(4, 6), torch.zeros(4)),
        "unet.nor": Dense(torch.zeros(6)),
        "text_encoder.x": Dense(torch.zeros(6)),
    }
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(net, updates, "style")
    said = str(caught.value)
    assert "unet.proj: the file changes a bias, and the module has none" in said
    assert "unet.nor: not in the model. Did you mean unet.norm" in said
    assert "text_encoder.x: not in the model" in said
    assert snapshot(net) == before


def test_a_weight_that_trains_whole_takes_no_other_method(net: dict[str, nn.Module]) -> None:
    rule = TargetRule.model_validate({"match": "unet.norm", "method": "full"})
    plan = make_plan([rule], module_tree(net))
    inject(net, plan, "trained")
    with pytest.raises(AdapterFileError, match=r"unet\.norm: its weight is being trained whole"):
        load_adapter(net, dense_updates(net), "style")
    eject(net, "trained")
    load_adapter(net, dense_updates(net), "style")
    with pytest.raises(TargetError, match=r"unet\.norm carries an adapter that is no plain LoRA"):
        inject(net, plan, "trained")


def test_a_pipeline_can_be_given_and_nonsense_cannot(net: dict[str, nn.Module]) -> None:
    class Pipe:
        components = {**net, "scheduler": object()}  # noqa: RUF012 - as diffusers' property would give it

    load_adapter(Pipe(), dense_updates(net), "style")
    set_scale(Pipe(), {"style": 0})
    eject(Pipe(), "style")
    with pytest.raises(TargetError, match="got a SmallNet; allowed: a diffusers pipeline"):
        load_adapter(net["unet"], {}, "style")
    with pytest.raises(TargetError, match="may hold torch modules alone; got scheduler: object"):
        set_scale({**net, "scheduler": object()}, {})
