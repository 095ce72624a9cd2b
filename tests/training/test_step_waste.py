"""What an optimizer step must not do beside the networks' own work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_kit.training import train


def test_a_step_walks_through_no_network(make_recipe, monkeypatch):
    """A walk over all modules costs a CPU milliseconds a step, at batch 1 a GPU's idle time as well."""
    from lora_kit.training import one_step

    walks = list[list[str]]()
    walk, step = nn.Module.named_modules, one_step.training_step

    def counted(module: nn.Module, *arguments: Any, **options: Any) -> Iterator[Any]:
        yield from walk(module, *arguments, **options)
        if walks and "UNet" in type(module).__name__:  # a walk that was left at its first module costs nothing
            walks[-1].append(type(module).__name__)

    def watched(*arguments: Any, **options: Any) -> Any:
        walks.append([])
        return step(*arguments, **options)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    monkeypatch.setattr(one_step, "training_step", watched)
    train(make_recipe("train.max_steps=3", "save.every=0"))
    # What lies between the last step and the next is counted with the step; after the last the result is written.
    assert len(walks) == 3
    assert walks[:-1] == [[], []]
