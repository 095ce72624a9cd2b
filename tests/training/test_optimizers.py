"""Optimizers by name: what they do, what they refuse, and that their state comes back bit for bit."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from lora_kit.errors import RecipeError, TrainingError
from lora_kit.recipe import Recipe
from lora_kit.recipe.optimizer import OPTIMIZERS
from lora_kit.training.optimization.optimizer_state import flatten_optimizer, restore_optimizer
from lora_kit.training.optimization.optimizers import build_optimizer, check_optimizer, set_learning_rate

CPU = torch.device("cpu")
ON_CPU = [name for name in OPTIMIZERS if not name.startswith("paged")]


def recipe(**optimizer) -> Recipe:
    schedule = optimizer.pop("schedule", {})
    return Recipe.model_validate({"data": {"sources": [{"path": "x"}]}, "optimizer": optimizer, "schedule": schedule})


def weights() -> list[nn.Parameter]:
    """A matrix that 8-bit moments take, a channels-last convolution, and zeros, such as an up matrix has at first."""
    torch.manual_seed(0)
    conv = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    return [nn.Parameter(torch.randn(80, 80)), nn.Parameter(conv), nn.Parameter(torch.zeros(8, 4))]


def groups(parameters: list[nn.Parameter], lr: float) -> list[dict]:
    """Two rates: the second half the first."""
    return [
        {"params": parameters[:1], "lr": lr, "peak_lr": lr},
        {"params": parameters[1:], "lr": lr / 2, "peak_lr": lr / 2},
    ]


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    """Those of a bowl around 1, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = parameter.detach() - 1 + 0.1 * torch.randn(parameter.shape, generator=generator)


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int) -> None:
    set_gradients(parameters, seed)
    optimizer.step()


@pytest.mark.parametrize("name", ON_CPU)
def test_every_optimizer_goes_on_from_its_saved_state_as_if_never_stopped(name):
    settings = recipe(name=name)
    whole, halved = weights(), weights()
    first = build_optimizer(groups(whole, settings.optimizer.lr), settings)
    for seed in range(6):
        step(first, whole, seed)
    before = build_optimizer(groups(halved, settings.optimizer.lr), settings)
    for seed in range(3):
        step(before, halved, seed)
    tensors, document = flatten_optimizer(before)
    after = build_optimizer(groups(halved, settings.optimizer.lr), settings)
    restore_optimizer(after, tensors, json.loads(json.dumps(document)))
    for seed in range(3, 6):
        step(after, halved, seed)
    assert all(torch.equal(a, b) for a, b in zip(whole, halved, strict=True))
    assert not torch.equal(whole[0], weights()[0])
    ends = [flatten_optimizer(optimizer) for optimizer in (first, after)]
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(ends[0][0][key], ends[1][0][key]) for key in ends[0][0] | ends[1][0])


@pytest.mark.parametrize("name", ON_CPU)
def test_a_groups_rate_scales_its_updates_with_every_optimizer(name):
    # The same weights and gradients at lr and lr / 2: the first update is in proportion to the rate in all of them
    # (AdamW's decay of the weights, too). fp32 rounds each of a few operations to 2^-24 of weights of order 1.
    settings = recipe(name=name)
    lr = settings.optimizer.lr if name != "prodigy" else 1.0
    pair = [nn.Parameter(torch.full((64, 64), 0.5)) for _ in range(2)]
    optimizer = build_optimizer(groups(pair, lr), settings)
    set_learning_rate(optimizer, 1.0)
    for _ in range(1 if name != "radam_schedulefree" else 6):  # RAdam's first steps have rate zero
        for parameter in pair:
            parameter.grad = torch.linspace(0.5, 1.0, 64 * 64).view(64, 64)
        optimizer.step()
    moved = [0.5 - parameter.detach() for parameter in pair]
    assert float(moved[0].abs().min()) > 0
    error = 64 * 2**-24 / float(moved[1].abs().min())
    torch.testing.assert_close(moved[0] / moved[1], torch.full((64, 64), 2.0), rtol=error, atol=0)


def test_prodigy_at_two_rates_is_two_prodigies():
    from prodigyopt import Prodigy

    settings = recipe(name="prodigy", schedule={"warmup_steps": 3})
    ours, theirs = weights(), weights()
    optimizer = build_optimizer(groups(ours, 1.0), settings)
    alone = [Prodigy([group], safeguard_warmup=True) for group in groups(theirs, 1.0)]
    for seed in range(20):
        step(optimizer, ours, seed)
        set_gradients(theirs, seed)
        for one in alone:
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [group["d"] for group in optimizer.param_groups] == [one.param_groups[0]["d"] for one in alone]
    assert optimizer.param_groups[0]["d"] > 1e-6  # it found a rate


def test_adafactor_uses_the_recipes_rate_alone():
    parameters = [nn.Parameter(torch.zeros(4, 4))]
    optimizer = build_optimizer([{"params": parameters, "lr": 0.5, "peak_lr": 0.5}], recipe(name="adafactor", lr=0.5))
    parameters[0].grad = torch.ones(4, 4)
    optimizer.step()
    # Shazeer & Stern 2018: a uniform gradient over its own root mean square is 1; 0.5 × 1 to fp32's rounding.
    torch.testing.assert_close(parameters[0].detach(), torch.full((4, 4), -0.5), rtol=4 * 2**-24, atol=0)


def test_torch_optimizers_are_fused_unless_told_otherwise():
    parameters = [nn.Parameter(torch.zeros(2))]
    for name in ("adamw", "adam", "sgd"):
        assert build_optimizer([{"params": parameters}], recipe(name=name)).defaults["fused"] is True
    plain = build_optimizer([{"params": parameters}], recipe(args={"foreach": True}))
    assert not plain.defaults["fused"]


def test_a_class_by_name_takes_its_own_arguments():
    optimizer = build_optimizer(
        [{"params": [nn.Parameter(torch.zeros(2))]}], recipe(name="torch.optim.RMSprop", args={"momentum": 0.5})
    )
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert optimizer.defaults["momentum"] == 0.5


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ({"name": "adamw", "args": {"amsgard": True}}, r"optimizer.args.amsgard: unknown. Did you mean amsgrad\?"),
        ({"name": "torch.optim.RMSprop", "betas": [0.9, 0.99]}, r"optimizer.betas: unknown.*allowed: alpha, eps"),
        ({"name": "torch.optim.AdamWW"}, r"`torch.optim` has no AdamWW. Did you mean AdamW"),
        ({"name": "no_such_package.Own"}, r"pip install no_such_package"),
        ({"name": "torch.nn.Linear"}, "is no torch.optim.Optimizer"),
        ({"name": "torch.optim.LBFGS"}, "needs a closure"),
        ({"name": "sgd", "args": {"momentum": -1.0}}, "sgd refuses .*momentum=-1.0"),
        ({"name": "paged_adamw8bit"}, "needs a CUDA GPU; this run is on `cpu`. Use adamw8bit."),
        ({"name": "bitsandbytes.optim.PagedLion32bit"}, "needs a CUDA GPU.*adamw8bit or adamw"),
    ],
)
def test_what_is_wrong_with_an_optimizer_is_told_before_the_run(optimizer, said):
    with pytest.raises(RecipeError, match=f"(?s){said}"):
        check_optimizer(recipe(**optimizer), CPU)


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("adamw_schedulefree", "schedulefree")])
def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(RecipeError, match=rf'pip install {package} \(or "lora_kit\[optimizers\]"\)'):
        check_optimizer(recipe(name=name), CPU)


def test_nothing_is_printed_on_standard_output(capsys):
    check_optimizer(recipe(name="prodigy", weight_decay=0.1), CPU)
    assert capsys.readouterr().out == ""


class Whole(torch.optim.SGD):
    """An optimizer that counts in whole numbers and nests its state."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("count", torch.zeros(2, dtype=torch.int64)).add_(1)
                state.setdefault("seen", [(1, torch.ones(2, dtype=torch.float64))])


def test_a_state_of_any_kind_keeps_its_types():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = Whole([parameter], lr=1.0)
    optimizer.step()
    again = Whole([parameter], lr=1.0)
    restore_optimizer(again, *flatten_optimizer(optimizer))
    state = again.state[parameter]
    assert state["count"].dtype == torch.int64
    assert state["count"].tolist() == [1, 1]
    assert state["seen"][0][0] == 1


def test_a_state_that_cannot_be_saved_is_refused():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    optimizer.state[parameter]["model"] = object()
    with pytest.raises(TrainingError, match=r"keeps a object at 0\.model"):
        flatten_optimizer(optimizer)


def test_another_optimizers_state_is_refused():
    parameters = weights()
    saved = flatten_optimizer(build_optimizer(groups(parameters, 1.0), recipe(name="prodigy")))
    with pytest.raises(TrainingError, match=r"is prodigyopt.prodigy.Prodigy, the recipe's torch.optim.adamw.AdamW"):
        restore_optimizer(build_optimizer(groups(parameters, 1.0), recipe()), *saved)
