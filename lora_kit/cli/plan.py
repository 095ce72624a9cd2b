"""`lora-kit plan`: what a recipe would train, without loading weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from lora_kit.cli.plan_facts import Memory, Steps
    from lora_kit.cli.plan_sources import DataFacts
    from lora_kit.models.outline import Outline
    from lora_kit.models.repeated_blocks import CompilePlan
    from lora_kit.recipe import Recipe
    from lora_kit.targeting import TargetPlan


def command(
    recipe: Annotated[str, typer.Argument(help="A YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the recipe's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    activations: Annotated[
        bool, typer.Option("--memory", help="Also reckon a step's activations and peak memory: some seconds more.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also load the base and run three steps on noise: their time and memory.")
    ] = False,
) -> None:
    """Show which modules the rules pick, what the sources hold, the buckets, the steps, and an estimate of the memory.
    Loads no weights and decodes no picture, but with --probe, which loads the base."""
    from lora_kit.recipe import load_recipe

    facts = _planned(load_recipe(recipe, overrides or ()), activations or probe)
    if as_json:
        typer.echo(json.dumps(_document(facts, probe), ensure_ascii=False, indent=1))
    else:
        _show(facts, probe)


class _Facts(NamedTuple):
    """All that a plan says."""

    recipe: Recipe
    plan: TargetPlan
    rates: dict[str, float]
    data: DataFacts
    length: Steps
    memory: Memory
    compiled: CompilePlan | None


def _planned(loaded: Recipe, activations: bool) -> _Facts:
    """Everything of the plan, a step's activations if asked; raises what the run would raise before its first step, as
    far as headers and configs tell."""
    from lora_kit.cli.plan_compile import compiled
    from lora_kit.cli.plan_facts import memory, steps
    from lora_kit.cli.plan_memory import with_step
    from lora_kit.cli.plan_sources import data_facts
    from lora_kit.models.outline import read_outline
    from lora_kit.recipe.without_text import fitted_to_base
    from lora_kit.targeting import make_plan
    from lora_kit.targeting.quantised import quantised_layers
    from lora_kit.targeting.rates import module_rates

    base = read_outline(loaded.model)
    loaded = fitted_to_base(loaded, base.side_step)
    plan = make_plan(loaded.targets, base.tree)
    _check_base(loaded, base, plan)
    _check_optimizer(loaded)
    rates = module_rates(plan, loaded.optimizer)
    data = data_facts(loaded.data)
    length = steps(loaded, data.samples, data.buckets.steps if data.buckets else None)
    few_bits = quantised_layers(loaded.model.quantize, base.tree, plan)
    held = memory(loaded, plan, base.parameters, few_bits)
    held = with_step(held, loaded, plan, few_bits, data.samples or 0) if activations else held
    return _Facts(loaded, plan, rates, data, length, held, compiled(loaded, base.tree, plan, data))


def _check_base(recipe: Recipe, base: Outline, plan: TargetPlan) -> None:
    """What the recipe may not ask of this base."""
    from lora_kit.models.adapter_layouts import layout_for
    from lora_kit.recipe.inpainting import check_inpainting
    from lora_kit.recipe.objective import check_against_base

    if base.prediction_type is not None:
        predicts = recipe.model.prediction_type or base.prediction_type
        check_against_base(recipe.objective, recipe.model.base, predicts, base.timesteps or 1000)
    check_inpainting(recipe, base.family, fills=base.family.endswith("-inpainting"))
    layout_for(recipe.save, base.family, plan.methods)
    if recipe.model.adapter:
        from lora_kit.adapters import read_raw
        from lora_kit.training.start import starting_updates

        path = Path(recipe.model.adapter)
        starting_updates(path, read_raw(path), {module.name: module for module in base.tree}, plan, base.family)


def _check_optimizer(recipe: Recipe) -> None:
    """What of it may be wrong beyond the recipe's own checks: a class, its arguments, a package. Without those, torch
    need not be imported, which takes longer than the rest of a plan. Whether there is a GPU is the run's question."""
    if recipe.optimizer.known is None or recipe.optimizer.args or recipe.optimizer.name not in ("adamw", "adam", "sgd"):
        import torch

        from lora_kit.training.optimization.optimizers import check_optimizer

        check_optimizer(recipe, torch.device("cuda"))


def _document(facts: _Facts, probe: bool) -> dict[str, Any]:
    from lora_kit.cli.plan_buckets import bucket_json
    from lora_kit.cli.plan_compile import compile_json
    from lora_kit.cli.plan_memory import memory_json
    from lora_kit.cli.plan_probe import probed
    from lora_kit.cli.plan_sources import source_json
    from lora_kit.cli.plan_tokens import token_json
    from lora_kit.targeting import plan_to_json

    recipe, plan, rates, data, length, held, compiled = facts
    return {
        "base": recipe.model.base,
        "trainable_parameters": plan.trainable_parameters,
        "plan": plan_to_json(plan),
        "learning_rates": rates,
        "tokens": token_json(recipe),
        "data": source_json(data.survey),
        "buckets": bucket_json(data.buckets) if data.buckets else None,
        "steps": length._asdict(),
        "compile": compile_json(compiled),
        "memory_bytes": memory_json(held),
        **({"probe": probed(recipe)._asdict()} if probe else {}),
    }


def _show(facts: _Facts, probe: bool) -> None:
    from rich.console import Console

    from lora_kit.cli.plan_buckets import bucket_lines, bucket_table
    from lora_kit.cli.plan_memory import memory_lines
    from lora_kit.cli.plan_probe import probe_lines, probed
    from lora_kit.cli.plan_sources import source_lines, source_table
    from lora_kit.cli.plan_tokens import token_lines
    from lora_kit.targeting import plan_table

    recipe, plan, rates, data, length, held, compiled = facts
    console = Console(highlight=False)
    tables = [*([plan_table(plan)] if plan.targets else []), source_table(data.survey)]
    for table in [*tables, *([bucket_table(data.buckets)] if data.buckets else [])]:
        console.print(table)
    lines = [*([_rates_line(rates, recipe.optimizer.lr_ratio)] if rates else []), *token_lines(recipe)]
    lines += [*source_lines(data.survey), *(bucket_lines(data.buckets) if data.buckets else ())]
    lines += [compiled.line()] if compiled else []
    for line in [*lines, _steps_line(length), *memory_lines(held, recipe)]:
        console.print(line, markup=False, soft_wrap=True)
    for line in probe_lines(probed(recipe), recipe, held) if probe else ():
        console.print(line, markup=False, soft_wrap=True)


def _rates_line(rates: dict[str, float], ratio: float | None) -> str:
    counts = Counter(rates.values())
    listed = ", ".join(f"{rate:g} ({count} modules)" for rate, count in sorted(counts.items(), reverse=True))
    return f"learning rates: {listed}" + (f"; up matrices × {ratio:g}" if ratio else "")


def _steps_line(length: Steps) -> str:
    micro = f" in micro-batches of {length.micro_batch_size}" if length.micro_batch_size else ""
    if length.epochs is None:
        data = "a data set on the hub, not counted"
    else:
        data = f"{length.epochs:.3g} epochs of {length.samples_per_epoch:,} samples"
    return f"steps: {length.max_steps:,} of {length.batch_size} pictures{micro}; {data}"
