"""max_norm, block-wise rates and LoRA+ in whole runs."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lora_kit.adapters import read_adapter
from lora_kit.cli.main import main
from lora_kit.errors import RecipeError
from lora_kit.models import load_bundle
from lora_kit.targeting import ModuleInfo, Target
from lora_kit.training import train
from lora_kit.training.build import build_run
from lora_kit.training.optimization.max_norm import Limited, limit_norms, update_norm
from lora_kit.training.processes.launch import build_accelerator

METHODS = {"lora": {"rank": 3}, "rslora": {"rank": 3}, "loha": {"rank": 2}, "lokr": {"rank": 1, "factor": 2}}


def target_of(method: str, limit: float | None) -> Target:
    settings = METHODS[method]
    module = ModuleInfo("unet.conv", "conv", (8, 6, 3, 3), 8 * 6 * 9)
    return Target(module, 0, method, settings["rank"], 2.0, 0.0, 1.0, settings.get("factor"), max_norm=limit)


@pytest.mark.parametrize("method", METHODS)
def test_the_norm_is_that_of_the_update_and_the_limit_is_kept(method):
    from lora_kit.adapters.trained_parts import TrainedParts

    target = target_of(method, 0.25)
    torch.manual_seed(0)
    parts = TrainedParts(target, torch.randn(8, 6, 3, 3), seed=0)
    with torch.no_grad():
        for weight in parts.parameters():
            weight.normal_()
    named = {name: part.detach() for name, part in parts.named_parameters()}
    delta = parts.copied().weight_delta(1.0, None, torch.float64)
    found = update_norm(named, target.effective_alpha / target.rank)
    assert float(found) == pytest.approx(float(delta.norm()), rel=200 * 2**-24)
    report = limit_norms([Limited(target, list(parts.parameters()))])
    assert int(report.scaled) == 1
    assert float(report.mean) == pytest.approx(float(delta.norm()), rel=200 * 2**-24)
    after = parts.copied().weight_delta(1.0, None, torch.float64)
    assert float(after.norm()) == pytest.approx(0.25, rel=200 * 2**-24)
    # Only its length changed.
    assert torch.allclose(after / after.norm(), delta / delta.norm(), rtol=0, atol=200 * 2**-24)
    assert int(limit_norms([Limited(target._replace(max_norm=0.26), list(parts.parameters()))]).scaled) == 0


def test_a_run_keeps_its_updates_below_the_limit_and_tells_of_it(make_recipe, tmp_path):
    train(make_recipe("targets={preset: attention, rank: 2, max_norm: 0.001}", "optimizer.lr=0.1"))
    state = read_adapter(tmp_path / "run" / "adapter.safetensors", load_bundle(make_recipe().model).components)
    norms = [float(update.weight_delta(1.0).norm()) for update in state.updates.values()]
    assert max(norms) <= 0.001 * (1 + 1e-5)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("norms_limited", 0) > 0 and line["mean_norm"] > 0.001 for line in lines)


@pytest.mark.parametrize(
    "rule",
    [
        "init: pissa",
        "init: orthogonal, rank_dropout: 0.3, module_dropout: 0.2",
        "init: gaussian, max_norm: 0.01",
        "method: loha, rank_dropout: 0.3, module_dropout: 0.2, max_norm: 0.01",
    ],
)
def test_such_runs_resume_by_bits(make_recipe, tmp_path, rule):
    rules = f"targets={{preset: attention, rank: 2, {rule}}}"
    train(make_recipe(rules, name="whole"))
    train(make_recipe(rules, "train.max_steps=2", name="parted"))
    train(make_recipe(rules, "train.resume=latest", name="parted"))
    whole, parted = (
        read_adapter(tmp_path / name / "adapter.safetensors", load_bundle(make_recipe().model).components)
        for name in ("whole", "parted")
    )
    for name, update in whole.updates.items():
        for part, tensor in update.parts().items():
            assert torch.equal(tensor, parted.updates[name].parts()[part]), (name, part)


def groups(recipe):
    run = build_run(recipe, build_accelerator(recipe))
    names = {id(parameter): name for name, parameter in run.trainable.items()}
    return {names[id(p)]: group["peak_lr"] for group in run.learner.optimizer.param_groups for p in group["params"]}


def test_the_optimizer_has_the_rates_of_components_rules_blocks_and_factors(make_recipe):
    rules = (
        "targets=[{preset: attention, rank: 2, text_encoder: true}, {match: 'unet.mid_block.**.to_q', lr_scale: 0.5}]"
    )
    blocks = "optimizer.block_lr={'unet.down_blocks.**': 0.1, 'unet.down_blocks.0.**': 0.2}"
    rates = groups(make_recipe(rules, blocks, "optimizer.lr_ratio=16", "optimizer.text_encoder_lr=0.003"))

    def rate(start, end):
        found = {value for name, value in rates.items() if name.startswith(start) and end in name}
        assert len(found) == 1, (start, end, found)
        return found.pop()

    assert rate("unet.up_blocks", "lora_A") == 0.01
    assert rate("unet.up_blocks", "lora_B") == pytest.approx(0.16)
    assert rate("unet.down_blocks.0", "lora_A") == pytest.approx(0.002)
    assert rate("text_encoder", "lora_A") == 0.003
    assert rate("text_encoder", "lora_B") == pytest.approx(0.048)
    assert {r for n, r in rates.items() if n.startswith("unet.mid_block") and "to_q.lora_A" in n} == {0.005}


def test_dora_has_up_matrices_too(make_recipe):
    rates = groups(make_recipe("targets={preset: attention, rank: 2, method: dora}", "optimizer.lr_ratio=4"))
    by_part = {part: {rate for name, rate in rates.items() if name.endswith(f".{part}")} for part in ("up", "down")}
    assert by_part == {"up": {0.04}, "down": {0.01}}
    assert all(math.isclose(rate, 0.01) for name, rate in rates.items() if name.endswith("magnitude"))


def test_a_block_rate_that_matches_nothing_is_an_error_of_plan_too(make_recipe, tmp_path, capsys):
    recipe = make_recipe("optimizer.block_lr={'unet.down_block.**': 0.1}")
    with pytest.raises(RecipeError, match=r"optimizer\.block_lr: .*matches no adapted module"):
        build_run(recipe, build_accelerator(recipe))
    for override, said in (
        ("optimizer.block_lr={'unet.nothing.**': 0.1}", "matches no adapted module"),
        ("optimizer.name=torch.optim.Nothing", "has no Nothing"),
        ("optimizer.args={nothing: 1}", "optimizer.args.nothing: unknown"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["plan", str(tmp_path / "recipe.yaml"), override])
        assert caught.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path / "recipe.yaml"), "optimizer.lr_ratio=4"])
    assert "learning rates: 0.01 (" in capsys.readouterr().out
