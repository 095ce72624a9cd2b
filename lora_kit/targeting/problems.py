"""What can be wrong with rules that read well: they pick nothing, or nothing of what they pick is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_kit.targeting.globs import Pattern, compile_pattern, dead_alternatives
from lora_kit.targeting.names import spellings
from lora_kit.targeting.plan import ModuleInfo, PlanRule
from lora_kit.targeting.suggest import nearest_modules


def rule_problems(
    rules: Sequence[PlanRule], patterns: Sequence[Pattern], picks: Sequence[Sequence[int]], tree: Sequence[ModuleInfo]
) -> Iterator[str]:
    """One message for each rule, or preset, that does nothing; `picks` are each rule's indices into `tree`."""
    deciding = {index: number for number, picked in enumerate(picks) for index in picked}
    for part in _parts(rules):
        first = part[0]
        picked = {index for number in part for index in picks[number]}
        if not picked:
            yield _nothing(rules[first], patterns[first], tree)
        elif rules[first].preset is None:
            yield from _dead(rules[first], patterns[first], tree)
            yield from _idle_exclude(first, rules, picks)
    for group in _groups(rules):
        yield from _shadowed(group, rules, picks, deciding)


def _groups(rules: Sequence[PlanRule]) -> list[list[int]]:
    """Numbers of the rules that share a path: the rules of one preset stand or fall together."""
    groups: dict[str, list[int]] = {}
    for number, rule in enumerate(rules):
        groups.setdefault(rule.path, []).append(number)
    return list(groups.values())


def _parts(rules: Sequence[PlanRule]) -> list[list[int]]:
    """As groups, but a preset's text encoder apart: it was asked for, so it must pick something too."""
    parts: dict[tuple[str, str], list[int]] = {}
    for number, (path, preset, rule) in enumerate(rules):
        component = rule.match.split(".")[0] if preset else ""
        parts.setdefault((path, component), []).append(number)
    return list(parts.values())


def _nothing(placed: PlanRule, pattern: Pattern, tree: Sequence[ModuleInfo]) -> str:
    path, preset, rule = placed
    what = f"{path}: preset `{preset}` (`{rule.match}`)" if preset else f"{path}.match: `{rule.match}`"
    wrong_kind = [module for module in tree if any(map(pattern.matches, spellings(module.name)))]
    if wrong_kind:
        example = wrong_kind[0]
        said = f"matches {_modules(len(wrong_kind))}, but none that `{_wanted(placed)}` takes: for one,"
        return f"{what} {said} {example.name} is of kind {example.kind}. Change the kind, or the pattern."
    inside = _inside(pattern, tree)
    if inside:
        said = f"names no layer itself, but a part that holds {_modules(inside)}."
        return f"{what} {said} Put `.**` at its end to pick those."
    components = ", ".join(dict.fromkeys(module.component for module in tree))
    nearest = "".join(f"\n  {name}" for name in nearest_modules(pattern, [module.name for module in tree]))
    return f"{what} picks nothing. Names start with one of: {components}. The nearest modules:{nearest}"


def _wanted(placed: PlanRule) -> str:
    rule = placed.rule
    return f"kind: {rule.kind}" if rule.kind != "any" else f"method: {rule.method}"


def _inside(pattern: Pattern, tree: Sequence[ModuleInfo]) -> int:
    """How many modules lie below what a glob matches."""
    if not pattern.expansions or pattern.text.endswith("**"):
        return 0
    below = compile_pattern(f"{pattern.text}.**")
    return sum(any(map(below.matches, spellings(module.name))) for module in tree)


def _dead(placed: PlanRule, pattern: Pattern, tree: Sequence[ModuleInfo]) -> Iterator[str]:
    names = [name for module in tree for name in spellings(module.name)]
    dead = dead_alternatives(pattern, names)
    if dead:
        listed = ", ".join(f"`{text}`" for text in dead)
        said = f"`{placed.rule.match}` matches modules, but not with {listed} of its braces."
        yield f"{placed.path}.match: {said} Remove or correct what matches nothing."


def _idle_exclude(number: int, rules: Sequence[PlanRule], picks: Sequence[Sequence[int]]) -> Iterator[str]:
    """An exclude must follow what it cuts."""
    if not rules[number].rule.exclude:
        return
    before = {index: earlier for earlier in range(number) for index in picks[earlier]}
    if not any(index in before and not rules[before[index]].rule.exclude for index in picks[number]):
        said = f"`{rules[number].rule.match}` excludes {_modules(len(picks[number]))}, none of which a rule before"
        yield f"{rules[number].path}: {said} it picks. Put it after the rules it should cut, or remove it."


def _shadowed(
    group: Sequence[int], rules: Sequence[PlanRule], picks: Sequence[Sequence[int]], deciding: dict[int, int]
) -> Iterator[str]:
    picked = {index for number in group for index in picks[number]}
    by = dict.fromkeys(sorted(deciding[index] for index in picked))
    if not picked or any(number in by for number in group):
        return
    path, preset, rule = rules[group[0]]
    what = f"{path} (preset `{preset}`)" if preset else f"{path} (`{rule.match}`)"
    shadows = ", ".join(f"{rules[number].path} (`{rules[number].rule.match}`)" for number in by)
    said = (
        f"decides nothing: each of its {_modules(len(picked))} is matched again by {shadows}, and the last rule wins."
    )
    yield f"{what} {said} Put it after those, or remove it."


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"
