"""Initialisations, dropouts of ranks and modules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from pydantic import ValidationError
from torch import Tensor, nn

from lora_kit.adapters import AdapterState, adapter_state, eject, inject, load_adapter, set_scale, write_kohya
from lora_kit.adapters.inits import initial_pair
from lora_kit.adapters.injection import trainable_parameters
from lora_kit.recipe import TargetRule
from lora_kit.targeting import TargetPlan, make_plan, module_tree

ROUNDING = 72 * 4 * 2**-24  # sums of at most 72 products of numbers below 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.proj = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.conv(x).tanh().mean((2, 3)))


@pytest.fixture
def net() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"unet": Net().requires_grad_(False)}


def plan_of(net: dict[str, nn.Module], **rule: Any) -> TargetPlan:
    return make_plan([TargetRule.model_validate({"match": "unet.**", "rank": 4} | rule)], module_tree(net))


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def train(net: dict[str, nn.Module], plan: TargetPlan) -> None:
    weights = [weight for own in inject(net, plan).values() for weight in own]
    optimizer = torch.optim.SGD(weights, lr=0.05)
    for _ in range(3):
        net["unet"](pictures()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa"])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_training_begins_as_the_base_and_the_file_says_what_was_trained(
    net: dict[str, nn.Module], tmp_path: Path, init: str, method: str
) -> None:
    base = net["unet"](pictures())
    plan = plan_of(net, init=init, method=method)
    inject(net, plan)
    begun = net["unet"](pictures())
    if init == "orthogonal":  # its product is zero to rounding only
        assert torch.allclose(begun, base, rtol=0, atol=2 * ROUNDING)
    else:
        assert torch.equal(begun, base)
    eject(net)
    train(net, plan)
    live = net["unet"](pictures())
    assert not torch.allclose(live, base, rtol=0, atol=1e-3)
    set_scale(net, {"default": 0.0})
    assert torch.equal(net["unet"](pictures()), base)
    write_kohya(tmp_path / "a.safetensors", AdapterState(adapter_state(net, "default"), {}))
    eject(net)
    state = load_adapter(net, tmp_path / "a.safetensors")
    assert {update.rank for update in state.updates.values()} == {8 if init == "pissa" else 4}
    assert torch.allclose(net["unet"](pictures()), live, rtol=0, atol=4 * ROUNDING)


def test_pissa_starts_at_the_best_approximation_of_the_weight(net: dict[str, nn.Module]) -> None:
    weight = net["unet"].get_submodule("conv").weight
    assert isinstance(weight, Tensor)
    pair = initial_pair("pissa", 3, weight, 0.5, "key")
    matrix = weight.detach().double().flatten(1)
    singular = torch.linalg.svdvals(matrix)
    left = matrix - 0.5 * pair.up.double() @ pair.down.double()
    # Eckart and Young: what is left has the norm of the other singular values. fp32's SVD is off by n · 2^-24 or so.
    assert float(left.norm()) == pytest.approx(float(singular[3:].norm()), rel=72 * 2**-24)


def test_pissas_gradients_are_pefts(net: dict[str, nn.Module]) -> None:
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["proj"])
    theirs = inject_adapter_in_model(config, copy.deepcopy(net["unet"]))
    layer: Any = theirs.get_submodule("proj")
    plan = plan_of(net, match="unet.proj", init="pissa")
    down, up = inject(net, plan)["unet.proj"]
    net["unet"](pictures()).square().sum().backward()
    theirs(pictures()).square().sum().backward()
    # Singular vectors come with either sign: ours and PEFT's differ by one of each pair.
    signs = (down * layer.lora_A["default"].weight).sum(1).sign()
    for ours, wanted, shape in (
        (down, layer.lora_A["default"].weight, (-1, 1)),
        (up, layer.lora_B["default"].weight, (1, -1)),
    ):
        assert torch.allclose(ours * signs.view(shape), wanted, rtol=0, atol=1e-5)
        assert ours.grad is not None and wanted.grad is not None
        scale = float(wanted.grad.abs().max())
        assert torch.allclose(ours.grad * signs.view(shape), wanted.grad, rtol=0, atol=1e-4 * scale)


def test_large_weights_have_their_principal_part_found_by_the_randomised_method() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(1100, 40, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(1200, 40, generator=generator, dtype=torch.float64))[0]
    weight = (left * torch.arange(40, 0, -1)) @ right.T
    pair = initial_pair("pissa", 4, weight.float(), 1.0, "key")
    wanted = (left[:, :4] * torch.arange(40, 36, -1)) @ right[:, :4].T
    # Power steps: the 20 directions kept reach down to 20 / 40, (20/37)^(2·8) = 5e-5 of what is left mixes in.
    assert float((pair.up.double() @ pair.down.double() - wanted).norm() / wanted.norm()) < 1e-4
    again = initial_pair("pissa", 4, weight.float(), 1.0, "key")
    assert torch.equal(pair.up, again.up)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"init": "orthogonal", "rank": 3}, "takes an even rank"),
        ({"init": "pissa", "method": "dora"}, "use `lora`"),
        ({"init": "pissa", "max_norm": 1.0}, "remove one of the two"),
        ({"init": "gaussian", "method": "loha"}, "does nothing with `method: loha`"),
        ({"rank_dropout": 0.1, "method": "dora"}, "does nothing with `method: dora`"),
        ({"max_norm": 1.0, "method": "dora"}, "does nothing with `method: dora`"),
    ],
)
def test_what_does_not_go_together_is_refused(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TargetRule.model_validate({"match": "unet.**"} | rule)


def test_rank_dropout_leaves_out_ranks_of_a_sample_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    net: dict[str, nn.Module] = {"unet": nn.Sequential(nn.Linear(5, 7, bias=False)).requires_grad_(False)}
    plan = plan_of(net, rank_dropout=0.5)
    down, up = inject(net, plan)["unet.0"]
    with torch.no_grad():
        up.normal_()
    x = torch.randn(64, 3, 5)
    net["unet"].train()
    torch.manual_seed(5)
    found = net["unet"](x)
    torch.manual_seed(5)
    kept = torch.rand(64, 1, 4) >= 0.5
    base = x @ net["unet"].get_submodule("0.base_layer").weight.T  # type: ignore[union-attr,operator]
    wanted = base + (x @ down.T * kept / 0.5) @ up.T
    assert torch.allclose(found, wanted, rtol=0, atol=ROUNDING * 4)
    assert 0.3 < float(kept.float().mean()) < 0.7
    net["unet"].eval()
    assert torch.allclose(net["unet"](x), base + x @ down.T @ up.T, rtol=0, atol=ROUNDING * 4)


@pytest.mark.parametrize("method", ["lora", "loha", "oft", "diff"])
def test_module_dropout_leaves_out_whole_updates_while_training_only(net: dict[str, nn.Module], method: str) -> None:
    base = net["unet"](pictures())
    rank = {} if method in ("lora", "loha") else {"rank": 16}  # its default: the others have none
    plan = plan_of(net, method=method, module_dropout=0.5, **rank)
    inject(net, plan)
    with torch.no_grad():
        for own in trainable_parameters(net, plan).values():
            for weight in own:
                weight.normal_(0.0, 0.3)
    net["unet"].train()
    torch.manual_seed(0)
    outputs = [net["unet"](pictures()) for _ in range(40)]
    distinct = [o for i, o in enumerate(outputs) if not any(torch.equal(o, other) for other in outputs[:i])]
    assert len(distinct) == 4  # each of two modules in or out
    assert any(torch.equal(o, base) for o in outputs)
    net["unet"].eval()
    assert torch.equal(net["unet"](pictures()), net["unet"](pictures()))


def test_gradient_checkpointing_sees_the_same_dropout(net: dict[str, nn.Module]) -> None:
    from torch.utils.checkpoint import checkpoint

    plan = plan_of(net, rank_dropout=0.5, module_dropout=0.3, dropout=0.2)
    trainable = inject(net, plan)
    with torch.no_grad():
        for _, up in trainable.values():
            up.normal_()
    gradients: list[list[Tensor]] = []
    for recomputed in (False, True):
        torch.manual_seed(3)
        net["unet"].train().zero_grad()
        x = pictures(8).requires_grad_()
        output = checkpoint(net["unet"], x, use_reentrant=False) if recomputed else net["unet"](x)
        assert isinstance(output, Tensor)
        output.square().sum().backward()
        gradients.append([w.grad.clone() for own in trainable.values() for w in own if w.grad is not None])
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
