from __future__ import annotations

import re
from typing import Any

import pytest

from lora_kit.errors import TargetError
from lora_kit.recipe import PresetRules, TargetRule
from lora_kit.targeting import ModuleInfo, Target, TargetPlan, make_plan


def _plan(tree: list[ModuleInfo], *rules: TargetRule | PresetRules) -> TargetPlan:
    return make_plan(list(rules), tree)


def _rule(match: str, **values: Any) -> TargetRule:
    return TargetRule.model_validate({"match": match} | values)


def _names(plan: TargetPlan) -> list[str]:
    return [target.module.name for target in plan.targets]


def test_last_matching_rule_decides(small_tree: list[ModuleInfo]) -> None:
    plan = _plan(small_tree, _rule("unet.**", rank=4), _rule("unet.mid.**", rank=2), _rule("unet.mid.conv2", rank=8))
    ranks = {target.module.name: (target.rank, target.rule) for target in plan.targets}
    assert (ranks["unet.conv_in"], ranks["unet.mid.conv1"], ranks["unet.mid.conv2"]) == ((4, 0), (2, 1), (8, 2))


def test_exclude_takes_out_and_a_later_rule_puts_back(small_tree: list[ModuleInfo]) -> None:
    rules = (_rule("unet.**"), _rule("unet.mid.**", exclude=True), _rule("unet.mid.conv2"))
    names = _names(_plan(small_tree, *rules))
    assert "unet.mid.conv1" not in names
    assert "unet.mid.conv2" in names


def test_targets_are_in_tree_order(small_tree: list[ModuleInfo]) -> None:
    plan = _plan(small_tree, _rule("unet.mid.**"), _rule("unet.conv_in"))
    assert _names(plan) == ["unet.conv_in", "unet.mid.conv1", "unet.mid.conv2"]


def test_any_is_linear_and_conv_for_lora(small_tree: list[ModuleInfo]) -> None:
    assert {target.module.kind for target in _plan(small_tree, _rule("unet.**")).targets} == {"linear", "conv"}


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_kind(kind: str, small_tree: list[ModuleInfo]) -> None:
    assert {target.module.kind for target in _plan(small_tree, _rule("unet.**", kind=kind)).targets} == {kind}


def test_full_takes_any_module_with_parameters(small_tree: list[ModuleInfo]) -> None:
    targets = _plan(small_tree, _rule("unet.down.**", method="full", lr_scale=0.5)).targets
    assert [target.module.kind for target in targets] == ["linear", "linear", "linear", "other"]
    assert {target[2:7] for target in targets} == {("full", 0, 0.0, 0.0, 0.5)}


def test_alpha_is_the_rank_unless_given(small_tree: list[ModuleInfo]) -> None:
    plan = _plan(small_tree, _rule("unet.conv_in", rank=4), _rule("unet.mid.**", rank=4, alpha=1))
    assert [target.alpha for target in plan.targets] == [4.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("shape", "method", "expected"),
    [((8, 6), "lora", 3 * (6 + 8)), ((8, 4, 3, 3), "lora", 3 * (4 * 9 + 8)), ((8, 6), "full", 56)],
)
def test_target_parameters(shape: tuple[int, ...], method: str, expected: int) -> None:
    module = ModuleInfo("unet.x", "linear", shape, 56)
    assert Target(module, 0, method, 3, 3.0, 0.0, 1.0).parameters == expected


def test_base_parameters_default_to_the_tree(small_tree: list[ModuleInfo]) -> None:
    assert _plan(small_tree, _rule("unet.**")).base_parameters == {"unet": 700, "text_encoder": 100}


@pytest.mark.parametrize("spelling", ["text_encoder.encoder", "text_encoder.text_model.encoder", "text_encoder.**"])
def test_either_spelling_of_the_text_encoder(spelling: str, small_tree: list[ModuleInfo]) -> None:
    names = _names(_plan(small_tree, _rule(f"{spelling}.layers.*.mlp.fc1")))
    assert names == ["text_encoder.encoder.layers.0.mlp.fc1"]


def test_rules_after_a_preset_override_it(small_tree: list[ModuleInfo]) -> None:
    plan = make_plan(PresetRules(preset="all", rules=[_rule("unet.mid.**", rank=2)]), small_tree)
    assert [target.rank for target in plan.targets] == [16, 16, 16, 16, 2, 2]
    assert [rule.path for rule in plan.rules] == ["targets", "targets.rules.0"]


def _message(tree: list[ModuleInfo], *rules: TargetRule | PresetRules) -> str:
    with pytest.raises(TargetError) as caught:
        make_plan(list(rules), tree)
    return str(caught.value)


def test_rule_that_picks_nothing_names_the_nearest_modules(small_tree: list[ModuleInfo]) -> None:
    said = _message(small_tree, _rule("unet.**.attn1.to_kq"))
    assert said.startswith("targets.0.match: `unet.**.attn1.to_kq` picks nothing.")
    assert re.findall(r"\n  (\S+)", said)[0] in ("unet.down.0.attn1.to_k", "unet.down.0.attn1.to_q")


def test_nearest_modules_of_a_regular_expression(small_tree: list[ModuleInfo]) -> None:
    assert "\n  unet.mid.conv1" in _message(small_tree, _rule(r"re:unet\..*\.conv_?1x"))


def test_unknown_component_lists_the_known(small_tree: list[ModuleInfo]) -> None:
    assert "one of: unet, text_encoder." in _message(small_tree, _rule("vae.**"))


def test_glob_of_a_container_says_how_to_reach_inside(small_tree: list[ModuleInfo]) -> None:
    said = _message(small_tree, _rule("unet.mid"))
    assert "a part that holds 2 modules" in said
    assert "`.**`" in said


def test_wrong_kind_is_named(small_tree: list[ModuleInfo]) -> None:
    assert "unet.down.0.norm is of kind other" in _message(small_tree, _rule("unet.**.norm"))
    assert "unet.mid.conv1 is of kind conv" in _message(small_tree, _rule("unet.mid.**", kind="linear"))


def test_alternative_that_matches_nothing(small_tree: list[ModuleInfo]) -> None:
    assert "not with `v`, `out.1` of its braces" in _message(small_tree, _rule("unet.**.to_{q,k,v,out.1}"))


def test_shadowed_rule_names_its_shadows(small_tree: list[ModuleInfo]) -> None:
    said = _message(small_tree, _rule("unet.mid.**"), _rule("unet.mid.conv1"), _rule("unet.**", kind="conv"))
    assert said.startswith("2 problems")
    assert "targets.0 (`unet.mid.**`) decides nothing: each of its 2 modules" in said
    assert "by targets.2 (`unet.**`)" in said


def test_wholly_excluded_rule_is_shadowed(small_tree: list[ModuleInfo]) -> None:
    said = _message(small_tree, _rule("unet.mid.**"), _rule("unet.**", exclude=True))
    assert "targets.0 (`unet.mid.**`) decides nothing" in said


def test_exclude_before_what_it_should_cut(small_tree: list[ModuleInfo]) -> None:
    assert "Put it after" in _message(small_tree, _rule("unet.mid.**", exclude=True), _rule("unet.**"))


def test_preset_is_shadowed_only_as_a_whole(small_tree: list[ModuleInfo]) -> None:
    preset = PresetRules(preset="all", text_encoder=True)
    text = _rule("text_encoder.**", rank=2)
    tree = [*small_tree, ModuleInfo("text_encoder.encoder.layers.0.self_attn.q_proj", "linear", (8, 8), 64)]
    assert len(_plan(tree, preset, text).targets) == 8
    said = _message(tree, preset, text, _rule("unet.**", rank=2))
    assert "targets.0 (preset `all`) decides nothing" in said


def test_preset_that_picks_nothing(small_tree: list[ModuleInfo]) -> None:
    assert "targets.0: preset `kohya`" in _message(small_tree, PresetRules(preset="kohya"))


def test_presets_text_encoder_must_pick_something(small_tree: list[ModuleInfo]) -> None:
    without = [module for module in small_tree if module.component == "unet"]
    said = _message(without, PresetRules(preset="all", text_encoder=True))
    assert "preset `all` (`text_encoder." in said


def test_all_unreadable_patterns_at_once(small_tree: list[ModuleInfo]) -> None:
    said = _message(small_tree, _rule("unet.{a"), _rule("unet.**"), _rule("unet..b"))
    assert said.startswith("2 problems")
    assert "targets.0.match" in said
    assert "targets.2.match" in said


def test_no_rules(small_tree: list[ModuleInfo]) -> None:
    assert "has no rule" in _message(small_tree)
