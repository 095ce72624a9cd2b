"""A plan for human eyes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_kit.targeting.plan import PlanRule, Target, TargetPlan

if TYPE_CHECKING:
    from rich.table import Table


def plan_table(plan: TargetPlan) -> Table:
    """A rich table: a row for each rule or preset with what it decided, then each component and the sum.

    Shares of rules are of all components together, shares of components of that component.
    """
    from rich.box import SIMPLE_HEAD  # here, so that the command line starts without rich
    from rich.table import Table

    total = sum(plan.base_parameters.values())
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("rule", overflow="fold")
    table.add_column("modules", justify="right", no_wrap=True)
    table.add_column("each gets")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("of the base", justify="right", no_wrap=True)
    for path in dict.fromkeys(rule.path for rule in plan.rules):
        table.add_row(*_rule_row(plan, path, total))
    table.add_section()
    for component, size in plan.base_parameters.items():
        decided = [target for target in plan.targets if target.module.component == component]
        table.add_row(f"in {component} ({_millions(size)})", *_figures(decided, "", size))
    table.add_row(f"all ({_millions(total)})", *_figures(plan.targets, "", total), style="bold")
    return table


def _rule_row(plan: TargetPlan, path: str, total: int) -> list[str]:
    """The row of the rule at `path`; a preset's rules share theirs."""
    numbers = [number for number, rule in enumerate(plan.rules) if rule.path == path]
    first = plan.rules[numbers[0]]
    if first.rule.exclude:
        return [_text(first), "", "excluded", "", ""]
    decided = [target for target in plan.targets if target.rule in numbers]
    return [_text(first), *_figures(decided, _given(decided[0]) if decided else "", total)]


def _text(placed: PlanRule) -> str:
    if placed.preset:
        return f"preset {placed.preset}"
    kind = "" if placed.rule.kind == "any" else f" ({placed.rule.kind})"
    return placed.rule.match.replace("[", "\\[") + kind  # `[` starts markup in rich


def _given(target: Target) -> str:
    """What the rule gives each module; what is at its default is left out."""
    said = [_method(target)]
    usual = math.sqrt(target.rank) if target.method == "rslora" else target.rank
    if target.alpha != usual:
        said.append(f"alpha {target.alpha:g}")
    if target.dropout:
        said.append(f"dropout {target.dropout:g}")
    if target.init != "default":
        said.append(f"init {target.init}")
    if target.rank_dropout:
        said.append(f"rank dropout {target.rank_dropout:g}")
    if target.module_dropout:
        said.append(f"module dropout {target.module_dropout:g}")
    if target.max_norm is not None:
        said.append(f"norm ≤ {target.max_norm:g}")
    if target.lr_scale != 1:
        said.append(f"lr × {target.lr_scale:g}")
    return ", ".join(said)


def _method(target: Target) -> str:
    match target.method:
        case "full":
            return "full weights"
        case "diff":
            return "difference" if target.only == "all" else f"difference, {target.only} only"
        case "oft":
            return f"oft, blocks ≤ {target.block_size}"
        case "boft":
            return f"boft, {target.stages} stages, blocks ≤ {target.block_size}"
        case "lokr" if target.factor:
            return f"lokr rank {target.rank}, factor {target.factor}"
        case _:
            return f"{target.method} rank {target.rank}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _figures(decided: Sequence[Target], given: str, size: int) -> list[str]:
    parameters = sum(target.parameters for target in decided)
    share = f"{100 * parameters / size:.2f} %" if size else "–"
    return [str(len(decided)), given, f"{parameters:,}", share]
