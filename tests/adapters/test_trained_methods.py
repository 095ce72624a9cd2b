"""Every method that trains: it begins as the base, trains what its file says, and its file loads everywhere."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lora_kit.adapters import AdapterState, adapter_state, eject, inject, load_adapter, set_scale, write_kohya
from lora_kit.adapters.fusing import fuse
from lora_kit.adapters.injection import trainable_parameters
from lora_kit.adapters.scaling import without_adapters
from lora_kit.errors import TargetError
from lora_kit.recipe import TargetRule
from lora_kit.targeting import TargetPlan, make_plan, module_tree


class Net(nn.Module):
    """A linear layer, convolutions 1×1, 3×3 and strided, a norm over channels and one over features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(3, 8, 3, padding=1)
        self.group = nn.GroupNorm(2, 8)
        self.strided = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.pointwise = nn.Conv2d(12, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.proj = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pointwise(self.strided(self.group(self.conv3(x))).tanh())
        return self.proj(self.norm(y.mean((2, 3))))


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 6},
    "rslora": {"rank": 3, "alpha": 6},
    "dora": {"rank": 3, "alpha": 6},
    "loha": {"rank": 2, "alpha": 1},
    "lokr": {"rank": 1, "alpha": 2, "factor": 2},
    "oft": {"block_size": 4},
    "boft": {"block_size": 2},
    "diff": {},
}
MODULES = ("conv3", "strided", "pointwise", "proj")


@pytest.fixture
def net() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"unet": Net().requires_grad_(False)}


def plan_of(net: dict[str, nn.Module], **rule: Any) -> TargetPlan:
    return make_plan([TargetRule.model_validate({"match": "unet.**"} | rule)], module_tree(net))


def pictures() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(net: dict[str, nn.Module], method: str, steps: int = 4) -> TargetPlan:
    """Inject, and train some steps towards nothing in particular."""
    plan = plan_of(net, method=method, **METHODS[method])
    weights = [weight for own in inject(net, plan).values() for weight in own]
    optimizer = torch.optim.AdamW(weights, lr=0.02)
    for _ in range(steps):
        net["unet"](pictures()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return plan


@pytest.mark.parametrize("method", METHODS)
def test_it_begins_as_the_base(net: dict[str, nn.Module], method: str) -> None:
    before = net["unet"](pictures())
    plan = plan_of(net, method=method, **METHODS[method])
    trainable = inject(net, plan)
    after = net["unet"](pictures())
    # DoRA's magnitude is rounded to fp32 once: each layer's output moves by 2^-24 of itself, six layers deep.
    assert torch.allclose(after, before, rtol=0, atol=0 if method != "dora" else 64 * 2**-24)
    weights = [weight for own in trainable.values() for weight in own]
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in weights)
    assert sum(weight.numel() for weight in weights) == plan.trainable_parameters
    trains = {id(weight) for weight in net["unet"].parameters() if weight.requires_grad}
    assert trains == {id(weight) for weight in weights}


@pytest.mark.parametrize("method", METHODS)
def test_every_part_learns_and_the_base_does_not(net: dict[str, nn.Module], method: str) -> None:
    base = {name: weight.clone() for name, weight in net["unet"].named_parameters()}
    plan = plan_of(net, method=method, **METHODS[method])
    before = {name: [w.detach().clone() for w in own] for name, own in inject(net, plan).items()}
    eject(net)
    trained(net, method)
    after = trainable_parameters(net, plan)
    assert all(not torch.equal(old, new) for name in before for old, new in zip(before[name], after[name], strict=True))
    eject(net)
    assert all(torch.equal(base[name], weight) for name, weight in net["unet"].named_parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0, -1.0])
def test_the_file_is_what_was_trained(net: dict[str, nn.Module], tmp_path: Path, method: str, strength: float) -> None:
    trained(net, method)
    path = tmp_path / "adapter.safetensors"
    write_kohya(path, AdapterState(adapter_state(net, "default"), {}))
    set_scale(net, {"default": strength})
    live = net["unet"](pictures())
    eject(net)
    load_adapter(net, path)
    set_scale(net, {"default": strength})
    read = net["unet"](pictures())
    # W x + ΔW x against (W + ΔW) x: sums of at most 72 products of numbers below 4, through six layers.
    assert torch.allclose(live, read, rtol=0, atol=6 * 72 * 4 * 2**-24)
    set_scale(net, {"default": 0.0})
    off = net["unet"](pictures())
    eject(net)
    assert torch.equal(off, net["unet"](pictures()))


@pytest.mark.parametrize("method", METHODS)
def test_fused_is_live_and_off_is_the_base(net: dict[str, nn.Module], method: str) -> None:
    base = net["unet"](pictures())
    trained(net, method)
    live = net["unet"](pictures())
    with without_adapters(net):
        assert torch.equal(net["unet"](pictures()), base)
    assert torch.equal(net["unet"](pictures()), live)
    fuse(net)
    assert torch.allclose(net["unet"](pictures()), live, rtol=0, atol=6 * 72 * 4 * 2**-24)


def _peft_config(method: str) -> Any:
    targets: list[str] = list(MODULES)
    if method == "dora":
        return LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=targets)
    if method == "loha":
        return LoHaConfig(r=2, alpha=1, target_modules=targets)
    if method == "lokr":
        return LoKrConfig(r=1, alpha=2, decompose_factor=2, target_modules=targets)
    return LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=targets)


# Our part → PEFT's attribute.
_IN_PEFT = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector"}


def _peft_weight(layer: Any, part: str) -> Tensor:
    holder = getattr(layer, _IN_PEFT.get(part, part))["default"]
    return holder if isinstance(holder, Tensor) else holder.weight


@pytest.mark.parametrize("method", ["rslora", "dora", "loha"])
def test_outputs_and_gradients_are_those_of_pefts_layer(net: dict[str, nn.Module], method: str) -> None:
    theirs = inject_adapter_in_model(_peft_config(method), copy.deepcopy(net["unet"]))
    trained(net, method)
    state = adapter_state(net, "default")
    with torch.no_grad():
        for name in MODULES:
            for part, value in state[f"unet.{name}"].parts().items():
                weight = _peft_weight(theirs.get_submodule(name), part)
                weight.copy_(value.reshape(weight.shape))
    ours = net["unet"](pictures())
    others = theirs(pictures())
    assert torch.allclose(ours, others, rtol=0, atol=6 * 72 * 4 * 2**-24)
    ours.square().sum().backward()
    others.square().sum().backward()
    plan = plan_of(net, method=method, **METHODS[method])
    for target in plan.targets:
        own = trainable_parameters(net, plan)[target.module.name]
        names = list(target.shapes) if method != "rslora" else ["down", "up"]
        layer = theirs.get_submodule(target.module.name.partition(".")[2])
        for part, weight in zip(names, own, strict=True):
            wanted = _peft_weight(layer, part).grad
            assert weight.grad is not None and wanted is not None
            scale = float(wanted.abs().max())
            assert torch.allclose(weight.grad, wanted.reshape(weight.shape), rtol=0, atol=scale * 6 * 72 * 4 * 2**-24)


def test_rslora_is_scaled_by_the_root_of_the_rank(net: dict[str, nn.Module]) -> None:
    trained(net, "rslora")
    update = adapter_state(net, "default")["unet.proj"]
    parts = {name: part.double() for name, part in update.parts().items()}
    wanted = 6 / math.sqrt(3) * parts["up"] @ parts["down"]
    found = update.weight_delta(1.0, None, torch.float64)
    assert found is not None
    assert torch.allclose(found, wanted, rtol=1e-14, atol=0)


def test_a_bias_alone_can_train(net: dict[str, nn.Module]) -> None:
    plan = plan_of(net, method="diff", only="bias")
    assert [target.module.name for target in plan.targets] == [
        f"unet.{name}" for name in ("conv3", "group", "strided", "pointwise", "norm")
    ]
    assert plan.trainable_parameters == 8 + 8 + 12 + 8 + 8
    inject(net, plan)
    assert all(set(one.parts()) == {"diff_b"} for one in adapter_state(net, "default").values())


def test_what_a_modules_sides_forbid_is_refused(net: dict[str, nn.Module]) -> None:
    with pytest.raises(TargetError, match=r"unet\.proj has 8 outputs.*lower `stages`"):
        plan_of(net, match="unet.proj", method="boft", block_size=2, stages=4)


def test_methods_stand_beside_each_other_over_a_bf16_base(net: dict[str, nn.Module]) -> None:
    net["unet"].to(torch.bfloat16)
    rules = [
        {"match": "unet.conv3", "method": "loha", "rank": 2},
        {"match": "unet.proj", "method": "dora", "rank": 2},
        {"match": "unet.{norm,group}", "method": "diff"},
        {"match": "unet.strided", "rank": 2},
    ]
    plan = make_plan([TargetRule.model_validate(rule) for rule in rules], module_tree(net))
    trainable = inject(net, plan)
    with torch.autocast("cpu", torch.bfloat16):
        net["unet"](pictures()).square().sum().backward()
    weights = [weight for own in trainable.values() for weight in own]
    assert all(weight.dtype == torch.float32 for weight in weights)
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in weights)
    assert list(adapter_state(net, "default")) == [
        f"unet.{name}" for name in ("conv3", "group", "strided", "norm", "proj")
    ]
