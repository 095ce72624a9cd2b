"""What is said of bf16 on a processor that does not compute in it."""

from __future__ import annotations

import pytest
import torch

from lora_kit.cli.main import main
from lora_kit.training import precision, train

CPU = torch.device("cpu")
BF16 = "train.mixed_precision=bf16"


@pytest.mark.parametrize(("has_bf16", "asked", "device"), [(True, BF16, CPU), (False, "seed=1", CPU)])
def test_nothing_where_it_costs_nothing(make_recipe, monkeypatch, has_bf16, asked, device):
    monkeypatch.setattr(precision, "computes_bf16", lambda: has_bf16)
    assert precision.precision_notices(make_recipe(asked), device) == []
    assert precision.precision_notices(make_recipe(BF16), torch.device("cuda")) == []


def test_a_run_and_a_probe_tell_the_cost_and_what_to_set_instead(make_recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(precision, "computes_bf16", lambda: False)
    train(make_recipe(BF16, "train.max_steps=1", name="slow"))
    said = "bf16 takes several times as long as fp32 on this CPU"
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(tmp_path / "slow" / "recipe.yaml"), "--probe"])
    told = capsys.readouterr().out
    assert said in told and "`train.mixed_precision: no`" in told
