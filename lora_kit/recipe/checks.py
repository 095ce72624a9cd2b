"""Checks between sections of a recipe: what each section allows by itself, but the run as a whole cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from lora_kit.recipe.base import Problem
from lora_kit.recipe.compiling import compile_problems
from lora_kit.recipe.inpainting import inpainting_problems
from lora_kit.recipe.methods import WITH_UP_AND_DOWN
from lora_kit.recipe.objective import prediction_problems
from lora_kit.recipe.quantize import quantize_problems
from lora_kit.recipe.rules import PresetRules, TargetRule, listed
from lora_kit.recipe.save import layout_problem
from lora_kit.recipe.schedule import schedule_problems
from lora_kit.recipe.tokens import token_problems
from lora_kit.recipe.validation import result_problems, validation_problems

if TYPE_CHECKING:
    from lora_kit.recipe.sections import Recipe


def recipe_problems(recipe: Recipe) -> Iterator[Problem]:
    """Everything wrong between the sections of `recipe`, whose fields are each valid."""
    yield from _one_method(recipe)
    yield from _text_encoder_rate(recipe)
    yield from _steps(recipe)
    yield from schedule_problems(recipe.schedule, recipe.optimizer, recipe.train.max_steps)
    yield from _averages(recipe)
    yield from _lora_plus(recipe)
    yield from validation_problems(recipe)
    yield from inpainting_problems(recipe)
    yield from result_problems(recipe)
    yield from _targets_of_sources(recipe)
    yield from _prediction(recipe)
    yield from _begins_at_adapter(recipe)
    yield from _begins_twice(recipe)
    yield from _layout(recipe)
    yield from token_problems(recipe)
    trained = [one for one in _placed_rules(recipe) if _trains(one.rule)]
    yield from quantize_problems(recipe.model, trained)
    yield from compile_problems(recipe, trained)


class Placed(NamedTuple):
    """A preset or rule, and where it stands."""

    path: tuple[str | int, ...]
    rule: PresetRules | TargetRule


def _placed_rules(recipe: Recipe) -> Iterator[Placed]:
    """Every preset and rule with its path, in order."""
    if isinstance(recipe.targets, PresetRules):
        yield from _with_followers(("targets",), recipe.targets)
        return
    for index, item in enumerate(listed(recipe.targets)):
        yield from _with_followers(("targets", index), item)


def _with_followers(path: tuple[str | int, ...], item: PresetRules | TargetRule) -> Iterator[Placed]:
    yield Placed(path, item)
    if isinstance(item, PresetRules):
        for index, rule in enumerate(item.rules):
            yield Placed((*path, "rules", index), rule)


def _trains(rule: PresetRules | TargetRule) -> bool:
    return isinstance(rule, PresetRules) or not rule.exclude


def _one_method(recipe: Recipe) -> Iterator[Problem]:
    if recipe.targets == "none":
        return
    trained = [placed for placed in _placed_rules(recipe) if _trains(placed.rule)]
    if not trained:
        yield Problem(("targets",), "every rule has `exclude: true`, so nothing would be trained; add one without.")
        return
    first = trained[0]
    for path, rule in trained[1:]:
        if (rule.method == "full") != (first.rule.method == "full"):
            before = ".".join(map(str, first.path))
            said = f"`method: {rule.method}` beside `method: {first.rule.method}` of {before}: `full` makes a whole "
            fix = "model, the others an adapter. For whole weights in an adapter write `method: diff`."
            yield Problem((*path, "method"), f"{said}{fix}")


def _text_encoder_rate(recipe: Recipe) -> Iterator[Problem]:
    picks = any(_may_pick_text_encoder(rule) for _, rule in _placed_rules(recipe) if _trains(rule))
    if recipe.optimizer.text_encoder_lr is not None and not picks:
        said = "no rule picks from the text encoder, so this rate would do nothing; "
        fix = "set `text_encoder: true` beside `preset`, add a rule such as `match: text_encoder.**`, or remove it."
        yield Problem(("optimizer", "text_encoder_lr"), said + fix)


def _may_pick_text_encoder(rule: PresetRules | TargetRule) -> bool:
    """Exact for presets and globs that start with a plain name; a regular expression may pick anything."""
    if isinstance(rule, PresetRules):
        return rule.text_encoder
    return not rule.match.startswith("unet")


def _steps(recipe: Recipe) -> Iterator[Problem]:
    micro, batch = recipe.train.micro_batch_size, recipe.data.batch_size
    if micro is not None and micro > batch:
        said = f"got {micro}, but one optimizer step has only `data.batch_size` = {batch} pictures."
        yield Problem(("train", "micro_batch_size"), f"{said} Make this at most {batch}, or raise data.batch_size.")
    if recipe.train.overwrite and recipe.train.resume is not None:
        said = "`overwrite: true` begins anew, `train.resume` goes on from a checkpoint: keep one of them."
        yield Problem(("train", "overwrite"), said)


def _averages(recipe: Recipe) -> Iterator[Problem]:
    if recipe.train.ema_decay is not None and recipe.optimizer.is_schedule_free:
        said = f"`{recipe.optimizer.name}` averages the weights itself; remove one of the two."
        yield Problem(("train", "ema_decay"), said)
    if recipe.train.ema_warmup is not None and recipe.train.ema_decay is None:
        yield Problem(("train", "ema_warmup"), "does nothing without `train.ema_decay`; set that, or remove this.")


def _lora_plus(recipe: Recipe) -> Iterator[Problem]:
    methods = _methods(recipe)
    if recipe.optimizer.lr_ratio is not None and not methods & set(WITH_UP_AND_DOWN):
        methods_said = f"`method: {', '.join(sorted(methods))}` has none" if methods else "`targets: none` has none"
        said = f"LoRA+ sets apart up and down matrices, and {methods_said}; remove it."
        yield Problem(("optimizer", "lr_ratio"), said)


def _prediction(recipe: Recipe) -> Iterator[Problem]:
    """Where the recipe says what the network predicts; what the base's config says is checked once it is read."""
    if recipe.model.prediction_type is not None:
        for problem in prediction_problems(recipe.objective, recipe.model.prediction_type):
            yield Problem(("objective", *problem.path), problem.message)


def _begins_at_adapter(recipe: Recipe) -> Iterator[Problem]:
    if recipe.model.adapter is None:
        return
    if recipe.targets == "none":
        yield Problem(("model", "adapter"), "`targets: none` trains no adapter that could go on from it; remove it.")
    elif _methods(recipe) == {"full"}:
        said = (
            "an adapter's weights are no beginning for `method: full`; merge it into the base first (`lora-kit merge`)"
        )
        yield Problem(("model", "adapter"), f"{said}, or train an adapter.")


def _begins_twice(recipe: Recipe) -> Iterator[Problem]:
    if recipe.model.adapter is None:
        return
    for path, rule in _placed_rules(recipe):
        if rule.init != "default":
            said = f"`init: {rule.init}` beside `model.adapter`, at whose weights training begins: keep one of them."
            yield Problem((*path, "init"), said)


def _layout(recipe: Recipe) -> Iterator[Problem]:
    """What the file's layout cannot hold is told now, not after the run."""
    layout = recipe.save.format
    if layout is not None and (problem := layout_problem(layout, _methods(recipe))):
        yield Problem(("save", "format"), problem)


def _methods(recipe: Recipe) -> set[str]:
    return {rule.method for _, rule in _placed_rules(recipe) if _trains(rule)}


def _targets_of_sources(recipe: Recipe) -> Iterator[Problem]:
    """What the base predicts can only be asked while its weights are there."""
    if not any(_trains(rule) and rule.method == "full" for _, rule in _placed_rules(recipe)):
        return
    for index, source in enumerate(recipe.data.sources):
        if source.target == "base":
            said = "`target: base` needs the base's own weights, which `method: full` changes; train adapters"
            yield Problem(("data", "sources", index, "target"), f"{said}, or give regularisation pictures.")
