from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_kit.adapters.injection import eject, inject, trainable_parameters
from lora_kit.adapters.scaling import set_scale
from lora_kit.adapters.state import lora_layers
from lora_kit.errors import TargetError
from lora_kit.recipe import TargetRule
from lora_kit.targeting import TargetPlan, make_plan, module_tree


class Net(nn.Module):
    """A linear layer, convolutions 1×1, 3×3 and strided, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(6, 5, 1)])
        self.norm = nn.LayerNorm(5)
        self.proj = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks[0](self.strided(self.conv3(x)).tanh())
        return self.proj(self.norm(y.mean((2, 3))))


NAMES = ("unet.conv3", "unet.strided", "unet.blocks.0", "unet.proj")


@pytest.fixture
def net() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    network = Net()
    network.norm.requires_grad_(False)
    return {"unet": network}


def _plan(net: dict[str, nn.Module], *rules: dict[str, Any]) -> TargetPlan:
    given = rules or ({"match": "unet.**", "rank": 4},)
    return make_plan([TargetRule.model_validate(rule) for rule in given], module_tree(net))


def _x(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def _randomise(net: dict[str, nn.Module], name: str = "default") -> None:
    generator = torch.Generator().manual_seed(7)
    for layer in lora_layers(net, name).values():
        for factor in (layer.lora_A[name].weight, layer.lora_B[name].weight):
            assert isinstance(factor, Tensor)
            factor.data = torch.randn(factor.shape, generator=generator).to(factor.dtype)


def test_adapts_exactly_the_planned_modules(net: dict[str, nn.Module]) -> None:
    plan = _plan(net, {"match": "unet.conv3", "rank": 2}, {"match": "unet.proj", "rank": 3, "alpha": 6, "dropout": 0.5})
    assert list(inject(net, plan)) == ["unet.conv3", "unet.proj"]
    adapted = {name: module for name, module in net["unet"].named_modules() if isinstance(module, LoraLayer)}
    values = {name: (layer.r, layer.scaling, layer.lora_dropout["default"]) for name, layer in adapted.items()}
    assert {name: value[:2] for name, value in values.items()} == {
        "conv3": ({"default": 2}, {"default": 1.0}),
        "proj": ({"default": 3}, {"default": 2.0}),
    }
    assert isinstance(values["conv3"][2], nn.Identity)
    assert getattr(values["proj"][2], "p", None) == 0.5


def test_only_planned_parameters_train(net: dict[str, nn.Module]) -> None:
    trainable = inject(net, _plan(net))
    flat = {id(weight) for weights in trainable.values() for weight in weights}
    assert {id(weight) for weight in net["unet"].parameters() if weight.requires_grad} == flat
    assert len(flat) == 2 * len(NAMES)


def test_new_adapter_changes_nothing(net: dict[str, nn.Module]) -> None:
    before = net["unet"](_x())
    inject(net, _plan(net))
    assert torch.equal(net["unet"](_x()), before)


@pytest.mark.parametrize("name", NAMES)
def test_update_equals_an_independent_computation(name: str, net: dict[str, nn.Module]) -> None:
    net["unet"].double()
    module = net["unet"].get_submodule(name.removeprefix("unet."))
    assert isinstance(module, nn.Linear | nn.Conv2d)
    weight, bias = module.weight.detach().clone(), module.bias
    inject(net, _plan(net, {"match": name, "rank": 3, "alpha": 1.5}))
    _randomise(net)
    layer = lora_layers(net, "default")[name]
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    layer.lora_A.double()
    layer.lora_B.double()
    down, up = (factor.detach().double() for factor in factors if isinstance(factor, Tensor))
    set_scale(net, {"default": 0.25})
    delta = 0.25 * 1.5 / 3 * torch.einsum("or,r...->o...", up.flatten(1), down)
    if isinstance(module, nn.Linear):
        x = torch.randn(2, 5, dtype=torch.float64)
        expected = F.linear(x, weight + delta, bias)
    else:
        x = torch.randn(2, module.in_channels, 8, 8, dtype=torch.float64)
        expected = F.conv2d(x, weight + delta, bias, module.stride, module.padding)
    # Sums of under 100 products of numbers of order 1: rounding stays far below 1e-12 in float64.
    torch.testing.assert_close(net["unet"].get_submodule(name[5:])(x), expected, rtol=0, atol=1e-12)


def test_down_is_kaiming_uniform_and_up_zero(net: dict[str, nn.Module]) -> None:
    inject(net, _plan(net, {"match": "unet.strided", "rank": 64}))
    layer = lora_layers(net, "default")["unet.strided"]
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert isinstance(down, Tensor)
    assert isinstance(up, Tensor)
    assert not up.any()
    bound = (8 * 9) ** -0.5  # kaiming_uniform with a = √5: √(6 / (1 + 5) / fan_in)
    assert 0.99 * bound < down.abs().max() <= bound
    # Uniform on ±bound: deviation bound/√3; of the mean of n draws, bound/√(3n).
    assert abs(down.mean()) < 5 * bound / (3 * down.numel()) ** 0.5


def test_initial_weights_depend_on_seed_and_name_alone(net: dict[str, nn.Module]) -> None:
    other = copy.deepcopy(net)
    torch.manual_seed(1)
    everything = inject(net, _plan(net), seed=5)
    torch.manual_seed(2)
    alone = inject(other, _plan(other, {"match": "unet.proj", "rank": 4}), "named", seed=5)
    assert torch.equal(everything["unet.proj"][0], alone["unet.proj"][0])
    eject(other, "named")
    reseeded = inject(other, _plan(other, {"match": "unet.proj", "rank": 4}), seed=6)
    assert not torch.equal(everything["unet.proj"][0], reseeded["unet.proj"][0])


def test_text_encoder_starts_alike_in_both_module_trees() -> None:
    def start(inner: str) -> Tensor:
        tower = nn.Module()
        tower.add_module("encoder", nn.Linear(4, 4))
        if inner:
            outer = nn.Module()
            outer.add_module(inner, tower)
            tower = outer
        net = {"text_encoder": tower}
        return next(iter(inject(net, _plan(net, {"match": "text_encoder.**"})).values()))[0]

    assert torch.equal(start("text_model"), start(""))


def test_injection_leaves_the_global_generator_alone(net: dict[str, nn.Module]) -> None:
    state = torch.get_rng_state()
    inject(net, _plan(net))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_base_trains_fp32_weights(autocast: bool, net: dict[str, nn.Module]) -> None:
    net["unet"].to(torch.bfloat16)
    trainable = inject(net, _plan(net))
    _randomise(net)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = net["unet"](_x().to(torch.bfloat16))
    out.float().sum().backward()
    weights = [weight for pair in trainable.values() for weight in pair]
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in weights)
    assert net["unet"].get_parameter("proj.base_layer.weight").dtype == torch.bfloat16


def test_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        net: dict[str, nn.Module] = {"unet": Net()}
    trainable = inject(net, _plan(net))
    assert {weight.device.type for pair in trainable.values() for weight in pair} == {"meta"}


def test_layers_take_the_modules_training_mode(net: dict[str, nn.Module]) -> None:
    net["unet"].eval()
    inject(net, _plan(net, {"match": "unet.**", "dropout": 0.5}))
    assert not any(module.training for module in net["unet"].modules())


def test_full_trains_the_modules_own_weights_in_fp32(net: dict[str, nn.Module]) -> None:
    net["unet"].to(torch.bfloat16)
    weight = net["unet"].get_parameter("norm.weight")
    trainable = inject(net, _plan(net, {"match": "unet.{norm,proj}", "method": "full"}))
    assert list(trainable) == ["unet.norm", "unet.proj"]
    assert trainable["unet.norm"][0] is weight
    trained = {name for name, own in net["unet"].named_parameters() if own.requires_grad}
    assert trained == {"norm.weight", "norm.bias", "proj.weight", "proj.bias"}
    assert {own.dtype for pair in trainable.values() for own in pair} == {torch.float32}


def _snapshot(net: dict[str, nn.Module]) -> Any:
    network = net["unet"]
    modules = [(name, id(module), type(module), module.training) for name, module in network.named_modules()]
    flags = [(name, id(weight), weight.requires_grad, weight.dtype) for name, weight in network.named_parameters()]
    return modules, flags, sorted(vars(network))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eject_is_the_inverse_of_inject(method: str, dtype: torch.dtype, net: dict[str, nn.Module]) -> None:
    net["unet"].to(dtype)
    before, bits, output = _snapshot(net), copy.deepcopy(net["unet"].state_dict()), net["unet"](_x().to(dtype))
    inject(net, _plan(net, {"match": "unet.**", "method": method}))
    _randomise(net)
    eject(net)
    assert _snapshot(net) == before
    after = net["unet"].state_dict()
    assert list(after) == list(bits)
    assert all(torch.equal(after[name], bits[name]) for name in bits)
    assert torch.equal(net["unet"](_x().to(dtype)), output)


def test_a_copy_can_be_ejected_too(net: dict[str, nn.Module]) -> None:
    flags = {name: weight.requires_grad for name, weight in net["unet"].named_parameters()}
    inject(net, _plan(net))
    twin = copy.deepcopy(net)
    eject(twin)
    assert {name: weight.requires_grad for name, weight in twin["unet"].named_parameters()} == flags
    assert len(lora_layers(net, "default")) == len(NAMES)


def _two(net: dict[str, nn.Module]) -> tuple[TargetPlan, TargetPlan]:
    first, second = _plan(net, {"match": "unet.**", "rank": 2}), _plan(net, {"match": "unet.proj", "rank": 5})
    inject(net, first, "one")
    inject(net, second, "two", seed=1)
    _randomise(net, "one")
    _randomise(net, "two")
    return first, second


def test_second_adapter_leaves_the_first_trainable(net: dict[str, nn.Module]) -> None:
    first, second = _two(net)
    pairs = [*trainable_parameters(net, first, "one").values(), *trainable_parameters(net, second, "two").values()]
    assert all(weight.requires_grad for pair in pairs for weight in pair)


def test_ejecting_one_of_two_leaves_the_other(net: dict[str, nn.Module]) -> None:
    before = _snapshot(net)
    _two(net)
    set_scale(net, {"one": 1})
    alone = net["unet"](_x())
    eject(net, "two")
    assert torch.equal(net["unet"](_x()), alone)
    eject(net, "one")
    assert _snapshot(net) == before


def test_adapters_add_up_at_their_scales(net: dict[str, nn.Module]) -> None:
    net["unet"].double()
    proj = net["unet"].get_submodule("proj")
    _two(net)
    for layer in lora_layers(net, "one").values():
        layer.lora_A.double()
        layer.lora_B.double()
    adapted, x = net["unet"].get_submodule("proj"), torch.randn(3, 5, dtype=torch.float64)
    outputs = []
    for scales in ({"one": 0.5}, {"two": -2}, {"one": 0.5, "two": -2}):
        set_scale(net, scales)
        outputs.append(adapted(x) - proj(x))
    torch.testing.assert_close(outputs[0] + outputs[1], outputs[2], rtol=0, atol=1e-12)


def test_scale_zero_is_the_base_bit_for_bit(net: dict[str, nn.Module]) -> None:
    base = net["unet"](_x())
    _two(net)
    assert not torch.equal(net["unet"](_x()), base)
    set_scale(net, {"one": 0, "two": 0.0})
    assert torch.equal(net["unet"](_x()), base)
    set_scale(net, {"one": 1, "two": 1})
    assert not torch.equal(net["unet"](_x()), base)


def test_scaling_keeps_what_is_trainable(net: dict[str, nn.Module]) -> None:
    inject(net, _plan(net))
    before = [weight.requires_grad for weight in net["unet"].parameters()]
    set_scale(net, {"default": 0})
    assert [weight.requires_grad for weight in net["unet"].parameters()] == before


def test_unknown_adapter_is_refused(net: dict[str, nn.Module]) -> None:
    inject(net, _plan(net))
    with pytest.raises(TargetError, match="no adapter is named `other`; the network carries: default"):
        set_scale(net, {"other": 1})
    with pytest.raises(TargetError, match="no adapter is named `other`"):
        eject(net, "other")


def test_scale_must_be_finite(net: dict[str, nn.Module]) -> None:
    inject(net, _plan(net))
    with pytest.raises(TargetError, match="must be a finite number"):
        set_scale(net, {"default": float("nan")})


def test_full_adapter_cannot_be_scaled(net: dict[str, nn.Module]) -> None:
    inject(net, _plan(net, {"match": "unet.norm", "method": "full"}))
    set_scale(net, {"default": 1})
    with pytest.raises(TargetError, match="method: full"):
        set_scale(net, {"default": 0.5})


@pytest.mark.parametrize("name", ["", "style.v2", "keys"])
def test_impossible_adapter_name(name: str, net: dict[str, nn.Module]) -> None:
    with pytest.raises(TargetError, match="cannot name an adapter"):
        inject(net, _plan(net), name)


def test_taken_adapter_name(net: dict[str, nn.Module]) -> None:
    inject(net, _plan(net))
    with pytest.raises(TargetError, match="is injected already"):
        inject(net, _plan(net))


def test_plan_of_another_model_changes_nothing(net: dict[str, nn.Module]) -> None:
    other: dict[str, nn.Module] = {"unet": Net()}
    other["unet"].add_module("extra", nn.Linear(2, 2))
    other["unet"].add_module("proj", nn.Linear(7, 4))
    before = _snapshot(net)
    with pytest.raises(TargetError) as caught:
        inject(net, _plan(other))
    assert "unet.extra is not in the model" in str(caught.value)
    assert "unet.proj has shape (4, 5), the plan says (4, 7)" in str(caught.value)
    assert _snapshot(net) == before
