from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from lora_kit.errors import TargetError
from lora_kit.recipe import PresetRules, TargetRule
from lora_kit.targeting import ModuleInfo, TargetPlan, make_plan, plan_from_json, plan_table, plan_to_json


@pytest.fixture
def plan(small_tree: list[ModuleInfo]) -> TargetPlan:
    rules = [
        PresetRules(preset="all", rank=4, alpha=2.0, dropout=0.1),
        TargetRule(match="re:unet\\.mid\\.conv[12]", rank=2, lr_scale=0.5),
        TargetRule(match="unet.down.0.norm", method="full"),
    ]
    return make_plan(rules, small_tree)


def test_round_trip_through_text(plan: TargetPlan) -> None:
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


def test_json_holds_what_each_module_gets(plan: TargetPlan) -> None:
    target = next(item for item in plan_to_json(plan)["targets"] if item["module"]["name"] == "unet.mid.conv1")
    assert target["module"]["shape"] == [8, 8, 3, 3]
    assert [target[key] for key in ("method", "rank", "alpha", "dropout", "lr_scale")] == ["lora", 2, 2.0, 0.0, 0.5]


def test_damaged_plan_says_where(plan: TargetPlan) -> None:
    document = plan_to_json(plan)
    document["targets"][0]["rank"] = "many"
    with pytest.raises(TargetError, match=r"damaged at `targets\.0\.rank`"):
        plan_from_json(document)


def test_other_format_is_refused(plan: TargetPlan) -> None:
    with pytest.raises(TargetError, match="format 99"):
        plan_from_json(plan_to_json(plan) | {"format": 99})


def _printed(plan: TargetPlan) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(plan_table(plan))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue] - the StringIO above


def test_table_shows_rules_and_totals(plan: TargetPlan) -> None:
    lines = [" ".join(line.split()) for line in _printed(plan).splitlines()]
    low_rank = 4 * (4 * 9 + 8) + 4 * (8 + 8) + 4 * (6 + 8) + 4 * (8 + 8)
    mid = 2 * (8 * 9 + 8) + 2 * (8 + 8)
    assert f"preset all 4 lora rank 4, alpha 2, dropout 0.1 {low_rank:,} {low_rank / 8:.2f} %" in lines
    assert f"re:unet\\.mid\\.conv[12] 2 lora rank 2, lr × 0.5 {mid:,} {mid / 8:.2f} %" in lines
    assert "unet.down.0.norm 1 full weights 100 12.50 %" in lines
    total = low_rank + mid + 100
    assert f"in unet (0.0 M) 7 {total:,} {total / 7:.2f} %" in lines
    assert f"all (0.0 M) 7 {total:,} {total / 8:.2f} %" in lines
