"""Rules + module tree → plan. Pure functions; the module tree may lie on the meta device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from lora_kit.errors import TargetError
from lora_kit.recipe import PresetRules, TargetRule
from lora_kit.targeting.globs import Pattern, compile_pattern
from lora_kit.targeting.names import spellings
from lora_kit.targeting.parts import has_bias
from lora_kit.targeting.plan import ModuleInfo, PlanRule, Target, TargetPlan
from lora_kit.targeting.presets import flat_rules
from lora_kit.targeting.problems import rule_problems


def make_plan(
    targets: PresetRules | Sequence[PresetRules | TargetRule] | Literal["none"],
    tree: Sequence[ModuleInfo],
    base_parameters: Mapping[str, int] | None = None,
) -> TargetPlan:
    """Let every rule pick from `tree` (see `module_tree`); the last rule that matches a module decides.

    `base_parameters` (parameters of each component) is for the shares shown; the tree's own sums by default.
    "none" picks nothing. A rank above the layer's own dimensions is allowed, as in PEFT: it costs memory and does no
    harm.

    Raises TargetError with everything wrong at once: a pattern that cannot be read, a rule that picks nothing
    (with the nearest module names), an alternative in braces that matches nothing, an `exclude` that takes
    nothing out, a rule or whole preset that later rules shadow (with those).
    """
    if targets == "none":
        return TargetPlan((), (), dict(base_parameters or _sums(tree)))
    rules = flat_rules(targets)
    if not rules:
        raise TargetError("`targets` has no rule, so nothing would be trained. Add `preset: attention`, for one.")
    patterns = _patterns(rules)
    picks = [_picks(rule.rule, pattern, tree) for rule, pattern in zip(rules, patterns, strict=True)]
    _refuse(rule_problems(rules, patterns, picks, tree))
    deciding = {index: number for number, picked in enumerate(picks) for index in picked}
    planned = tuple(
        _target(tree[index], deciding[index], rules[deciding[index]].rule)
        for index in sorted(deciding)
        if not rules[deciding[index]].rule.exclude
    )
    _refuse(list(_impossible(planned)))
    return TargetPlan(planned, tuple(rules), dict(base_parameters or _sums(tree)))


def _patterns(rules: Sequence[PlanRule]) -> list[Pattern]:
    patterns: list[Pattern] = []
    problems: list[str] = []
    for path, _, rule in rules:
        try:
            patterns.append(compile_pattern(rule.match))
        except TargetError as error:
            problems.append(f"{path}.match: {error}")
    _refuse(problems)
    return patterns


def _refuse(problems: Iterator[str] | Sequence[str]) -> None:
    found = list(problems)
    if found:
        head = f"{len(found)} problems with the rules under `targets`:\n" if len(found) > 1 else ""
        raise TargetError(head + "\n".join(found))


def _picks(rule: TargetRule, pattern: Pattern, tree: Sequence[ModuleInfo]) -> list[int]:
    """Indices of the modules that `rule` matches, in tree order."""
    kinds = _kinds(rule)
    return [
        index
        for index, module in enumerate(tree)
        if module.kind in kinds
        and _takes(rule, module)
        and any(pattern.matches(name) for name in spellings(module.name))
    ]


def _kinds(rule: TargetRule) -> frozenset[str]:
    """LoRA needs a matrix; whole weights can be trained, and anything be excluded, whatever the layer."""
    if rule.kind != "any":
        return frozenset({rule.kind})
    every = rule.method in ("full", "diff") or rule.exclude
    return frozenset({"linear", "conv", "other"} if every else {"linear", "conv"})


def _takes(rule: TargetRule, module: ModuleInfo) -> bool:
    """`diff` is for what has its weight's gradient from a batch alone: not for embeddings; nor for a bias not there."""
    if rule.method != "diff" or rule.exclude:
        return True
    embedding = module.kind == "other" and len(module.shape) != 1
    return not embedding and (rule.only != "bias" or has_bias(module))


def _impossible(planned: Sequence[Target]) -> Iterator[str]:
    """What a method cannot do over a module's sides."""
    for target in planned:
        try:
            _ = target.parameters
        except TargetError as error:
            yield str(error)


def _target(module: ModuleInfo, number: int, rule: TargetRule) -> Target:
    plain = Target(module, number, rule.method, 0, 0.0, 0.0, rule.lr_scale, max_norm=rule.max_norm)
    plain = plain._replace(module_dropout=rule.module_dropout, rank_dropout=rule.rank_dropout)
    match rule.method:
        case "full":
            return plain
        case "diff":
            return plain._replace(only=rule.only)
        case "oft" | "boft":
            return plain._replace(block_size=rule.block_size, stages=rule.stages)
        case _:
            default = math.sqrt(rule.rank) if rule.method == "rslora" else float(rule.rank)
            alpha = default if rule.alpha is None else rule.alpha
            return plain._replace(rank=rule.rank, alpha=alpha, dropout=rule.dropout, factor=rule.factor, init=rule.init)


def _sums(tree: Sequence[ModuleInfo]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for module in tree:
        sums[module.component] = sums.get(module.component, 0) + module.parameters
    return sums
