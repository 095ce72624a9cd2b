"""The moving average and a schedule-free optimizer's own: what stands in the model when."""

from __future__ import annotations

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import nn

from lora_kit.recipe import TrainSection
from lora_kit.training.optimization.ema import WeightAverage


@pytest.mark.parametrize(
    ("section", "decays"),
    [
        # diffusers: the first update has decay 0; update n + 1 min(decay, (1 + n) / (10 + n)).
        (TrainSection(ema_decay=0.25), [0.0, 2 / 11, 3 / 12, 0.25, 0.25]),
        # Crowson's: 1 - (1 + n)^-power.
        (TrainSection(ema_decay=0.6, ema_warmup=0.75), [0.0, 1 - 2**-0.75, 1 - 3**-0.75, 0.6, 0.6]),
    ],
)
def test_the_decay_rises_to_the_one_asked_for(section, decays):
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    average = WeightAverage({"w": weight}, section)
    expected = 0.0
    for step, decay in enumerate(decays):
        weight.data.fill_(float(step + 1))
        average.update()
        expected = decay * expected + (1 - decay) * (step + 1)
        # Some float64 roundings of numbers below 5.
        assert float(average.tensors()["w"]) == pytest.approx(expected, rel=1e-14)
    assert average.updates == len(decays)


def test_the_average_is_in_the_model_inside_and_the_weights_return_bit_for_bit():
    weight = nn.Parameter(torch.tensor([0.1, 0.2]))
    average = WeightAverage({"w": weight}, TrainSection(ema_decay=0.5))
    for _ in range(4):
        weight.data.mul_(1.7)
        average.update()
    before = weight.detach().clone()
    with average.applied():
        assert torch.equal(weight, average.tensors()["w"])
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)
    with average.final(moving=False):
        assert torch.equal(weight, before)
    with average.final(moving=True):
        assert torch.equal(weight, average.tensors()["w"])


def test_looking_at_a_schedule_free_average_changes_nothing_of_the_run():
    # The optimizer's own eval() and train() round there and back; a validation must not change a run by that.
    def trained(look: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(20, 20))
        optimizer = AdamWScheduleFree([weight], lr=0.1)
        optimizer.train()
        average = WeightAverage({"w": weight}, TrainSection(), optimizer)
        seen = []
        for _ in range(10):
            weight.grad = weight.detach() - 1
            optimizer.step()
            if look:
                with average.applied():
                    beta = optimizer.param_groups[0]["betas"][0]
                    seen.append(weight.detach().clone())
                # Defazio et al. 2024: y = (1 - β) z + β x. fp32 numbers of order 1, a few roundings.
                z = optimizer.state[weight]["z"]
                torch.testing.assert_close((1 - beta) * z + beta * seen[-1], weight.detach(), rtol=0, atol=8 * 2**-24)
        return weight.detach(), seen

    (plain, _), (looked, seen) = trained(look=False), trained(look=True)
    assert torch.equal(plain, looked)
    assert not torch.equal(seen[-1], looked)


def test_without_an_average_nothing_happens():
    weight = nn.Parameter(torch.ones(2))
    average = WeightAverage({"w": weight}, TrainSection(), torch.optim.SGD([weight], lr=1.0))
    average.update()
    with average.applied():
        assert torch.equal(weight, torch.ones(2))
    assert average.tensors() == {}
    assert average.describe() == "as trained"
