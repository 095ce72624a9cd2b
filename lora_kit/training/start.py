"""Training that begins at an adapter file's weights (`model.adapter`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lora_kit.adapters import RawAdapter, Update
from lora_kit.errors import AdapterFileError
from lora_kit.merging.other_family import fitted_to
from lora_kit.targeting import ModuleInfo, Target, TargetPlan

_SHOWN = 10


def starting_updates(
    path: Path, raw: RawAdapter, modules: Mapping[str, ModuleInfo], plan: TargetPlan, family: str | None = None
) -> dict[str, Update]:
    """The file's updates for the plan's modules, in whatever precision they are stored.

    raw: what `read_raw` made of `path`; modules: of the bare networks, by dotted name; family: the base's.
    Raises AdapterFileError for another family's file, and with everything in which it and the plan disagree: modules,
    methods, ranks, alphas.
    """
    state = fitted_to(path, raw, modules, "the recipe's base", family)
    problems = list(_disagreements(state.updates, {target.module.name: target for target in plan.targets}))
    if state.embeddings:
        problems.append(f"it comes with learned tokens ({', '.join(state.embeddings)}), which would be lost")
    if problems:
        more = [f"… {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        listed = "\n  ".join([*problems[:_SHOWN], *more])
        raise AdapterFileError(
            f"model.adapter: {path} is not what `targets` asks for; make the rules pick its modules with its ranks and "
            f"alphas (`lora-kit inspect` lists them), or leave it out:\n  {listed}"
        )
    return state.updates


@torch.no_grad()
def begin_at(components: Mapping[str, nn.Module], adapter_name: str, updates: Mapping[str, Update]) -> None:
    """Put the parts into the injected layers. Every one of `updates` must have its layer, of its shapes."""
    from lora_kit.adapters.layers import live_layers  # here: PEFT takes seconds, and `lora-kit plan` needs none of it

    layers = {name: layer for name, layer in live_layers(components).items() if adapter_name in layer.adapters}
    assert layers.keys() == updates.keys(), "the plan was checked against the file"
    for name, update in updates.items():
        parts = update.parts()
        lora, delta, _ = layers[name]
        if lora is not None and adapter_name in lora.lora_A:
            cast(Tensor, lora.lora_A[adapter_name].weight).copy_(parts["down"])
            cast(Tensor, lora.lora_B[adapter_name].weight).copy_(parts["up"])
            continue
        assert delta is not None
        for part, weight in delta.trained[adapter_name].named_parameters():
            weight.copy_(parts[part])


def _disagreements(updates: Mapping[str, Update], targets: Mapping[str, Target]) -> Iterator[str]:
    for name, target in targets.items():
        update = updates.get(name)
        if update is None:
            yield f"{name}: picked by the rules, not in the file"
        elif update.parts().keys() != target.shapes.keys():
            got = f"{update.method} with {', '.join(update.parts())}"
            yield f"{name}: the file has {got}, the rules say `method: {target.method}`"
        elif problem := _other_sizes(update, target):
            yield f"{name}: {problem}"
    for name in sorted(updates.keys() - targets.keys()):
        yield f"{name}: in the file, not picked by the rules"


def _other_sizes(update: Update, target: Target) -> str:
    alpha = update.alpha or 0.0
    close = math.isclose(alpha, target.effective_alpha, rel_tol=1e-6)  # files may hold alpha in fp32
    if target.rank and (update.rank not in (None, target.rank) or not close):
        got = f"rank {update.rank}, alpha {alpha:g}"
        said = f"rank {target.rank}, alpha {target.alpha:g}"
        known = f", which is {target.effective_alpha:g} in a file" if target.effective_alpha != target.alpha else ""
        return f"the file has {got}, the rules say {said}{known}"
    for part, shape in target.shapes.items():
        got = tuple(update.parts()[part].shape)
        if got != shape:
            return f"the file's {part} is {list(got)}, the rules say {list(shape)}"
    constrained = alpha and not target.rank
    return f"the file has alpha {alpha:g} (a constraint), which cannot be trained on" if constrained else ""
