"""What an optimizer step must not do beside the networks' own work."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

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


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_step_keeps_no_input_of_a_frozen_convolution(make_recipe, monkeypatch, targets: str) -> None:
    """Autograd's own convolution keeps it, though only its weight's gradient needs it."""
    from lora_kit.training import one_step

    kept, step = list[str](), one_step.training_step

    def watched(*arguments: Any, **options: Any) -> Any:
        with saved_by_convolutions(kept):
            return step(*arguments, **options)

    monkeypatch.setattr(one_step, "training_step", watched)
    train(make_recipe("train.max_steps=1", "schedule.warmup_steps=0", "save.every=0", f"targets={{preset: {targets}}}"))
    assert kept == []


@contextmanager
def saved_by_convolutions(kept: list[str]) -> Generator[None]:
    """Note the shape of every input that a call of torch's own convolution leaves to the backward pass."""
    own = nn.functional.conv2d

    def noted(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        made = own(x, *arguments, **options)
        if made.grad_fn is not None:
            kept.append(str(x.shape))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "conv2d", noted)
        yield
