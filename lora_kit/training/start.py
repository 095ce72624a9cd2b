"""Training that begins at an adapter file's weights (`model.adapter`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lora_kit.adapters import LoraUpdate, RawAdapter, Update, fitted
from lora_kit.adapters.state import is_plain_lora, lora_layers
from lora_kit.errors import AdapterFileError
from lora_kit.targeting import ModuleInfo, Target, TargetPlan

_SHOWN = 10


def starting_updates(
    path: Path, raw: RawAdapter, modules: Mapping[str, ModuleInfo], plan: TargetPlan
) -> dict[str, LoraUpdate]:
    """The file's updates for the plan's modules, in whatever precision they are stored.

    raw: what `read_raw` made of `path`; modules: of the bare networks, by dotted name. Raises AdapterFileError for
    another family's file, and with everything in which it and the plan disagree: modules, methods, ranks, alphas.
    """
    state = fitted(path, raw, modules)
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
    return cast("dict[str, LoraUpdate]", state.updates)


@torch.no_grad()
def begin_at(components: Mapping[str, nn.Module], adapter_name: str, updates: Mapping[str, LoraUpdate]) -> None:
    """Put the factors into the injected layers. Every one of `updates` must have its layer, of its rank."""
    layers = lora_layers(components, adapter_name)
    assert layers.keys() == updates.keys(), "the plan was checked against the file"
    for name, update in updates.items():
        cast(Tensor, layers[name].lora_A[adapter_name].weight).copy_(update.down)
        cast(Tensor, layers[name].lora_B[adapter_name].weight).copy_(update.up)


def _disagreements(updates: Mapping[str, Update], targets: Mapping[str, Target]) -> Iterator[str]:
    for name, target in targets.items():
        update = updates.get(name)
        if update is None:
            yield f"{name}: picked by the rules, not in the file"
        elif not is_plain_lora(update):
            yield f"{name}: the file has {update.method} with {', '.join(update.parts())}, the rules say `method: lora`"
        elif (update.rank, update.alpha) != (target.rank, target.alpha):
            got = f"rank {update.rank}, alpha {update.alpha:g}"
            yield f"{name}: the file has {got}, the rules say rank {target.rank}, alpha {target.alpha:g}"
    for name in sorted(updates.keys() - targets.keys()):
        yield f"{name}: in the file, not picked by the rules"
