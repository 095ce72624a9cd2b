"""What the interpreter and a run's libraries take beside all tensors: measured, as no config tells it.

With the imports alone it is not done. The first step brings the tokenizer, kernels' code and tables, and what torch and
the allocator keep for themselves: in bf16 oneDNN's code for the products of adapted layers alone is 60 MiB, and 120
where convolutions are among them. So a process of its own takes steps with the packaged base, in the recipe's
precision, with its optimizer and with adapters on layers of its kinds; what is resident then, less all its tensors, is
it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lora_kit.recipe import Recipe
    from lora_kit.targeting import TargetPlan
    from lora_kit.training.objects import Run

_SIDE = 64
_RANK = 16  # in bf16 kernels of rank 64 take 9 MiB more
_STEPS = 2  # the optimizer's own comes with the first


class Libraries(NamedTuple):
    """Bytes that no tensor holds; 0 where the system, or that process, does not tell."""

    all: int
    """Once steps are taken."""
    steps: int
    """Of these, what came with the first of them: code for the backward pass, and the optimizer's."""


@contextmanager
def measuring_libraries(
    recipe: Recipe, plan: TargetPlan, environment: Mapping[str, str]
) -> Generator[Callable[[], Libraries]]:
    """Start that process; inside, what is yielded waits for what it measured. It runs while others work, and takes some
    seconds. environment: its variables."""
    command = [sys.executable, "-m", "lora_kit.training.reckoning.libraries", json.dumps(_like(recipe, plan))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:

        def wait() -> Libraries:
            said = process.communicate()[0]
            return Libraries(*json.loads(said.splitlines()[-1])) if process.returncode == 0 else Libraries(0, 0)

        try:
            yield wait
        finally:
            process.kill()


def _like(recipe: Recipe, plan: TargetPlan) -> dict[str, Any]:
    """What of the recipe decides which code runs, on the packaged base. No CPU runs fp16, nor has paged optimizers."""
    convolutions = any(target.module.kind == "conv" for target in plan.targets)
    ranks = Counter(min(target.rank, _RANK) for target in plan.targets if target.rank)
    rank = ranks.most_common(1)[0][0] if ranks else _RANK
    precision = recipe.train.mixed_precision
    name = recipe.optimizer.name
    return {
        "model": {"base": "tiny", "quantize": recipe.model.quantize},
        "targets": {"preset": "all" if convolutions else "attention", "rank": rank},
        "data": {"sources": [{"path": "."}], "resolution": _SIDE, "batch_size": 1},
        "optimizer": {"name": "adamw" if name.startswith("paged") else name, "lr": recipe.optimizer.lr},
        "train": {"mixed_precision": "bf16" if precision == "fp16" else precision, "trackers": []},
        "output_dir": "unused",
    }


def _measured(tree: dict[str, Any]) -> Libraries:
    """In the process of its own."""
    import torch

    from lora_kit.allocator import keep_freed_blocks
    from lora_kit.recipe import Recipe
    from lora_kit.training.build import build_run
    from lora_kit.training.probe import made_up, stand_in_data
    from lora_kit.training.processes.launch import build_accelerator
    from lora_kit.training.reckoning.stages import autocast, predict
    from lora_kit.training.step import training_step

    keep_freed_blocks()  # as `lora-kit train` does
    recipe = Recipe.model_validate(tree)
    accelerator = build_accelerator(recipe)
    assert accelerator.device == torch.device("cpu"), "a GPU's tensors are counted without the libraries"
    run = build_run(recipe, accelerator, resumes=True, data=stand_in_data(recipe))
    with torch.no_grad():  # as a run's start encodes, and measures
        run.bundle.family.encode(run.bundle, torch.zeros(1, 3, _SIDE, _SIDE))
        with autocast(recipe, "cpu"):
            predict(run.bundle, 1, _SIDE)
    before = _beside_tensors(run)
    batches = made_up(run, accelerator)
    for step in range(_STEPS):
        training_step(run.learner, batches, step)
    found = _beside_tensors(run)
    return Libraries(found, max(0, found - before))


def _beside_tensors(run: Run) -> int:
    """Bytes that are resident once encoders and freed ones are given back, less weights and the optimizer's state."""
    from lora_kit.allocator import give_back_freed
    from lora_kit.models.released import RELEASED, release
    from lora_kit.training.peak_memory import resident_memory

    for name in RELEASED:
        release(run.bundle, name)
    give_back_freed()
    return max(0, (resident_memory() or 0) - _tensors(run))


def _tensors(run: Run) -> int:
    """Bytes of weights and the optimizer's state."""
    import torch

    state: Any = run.learner.optimizer.optimizer.state
    kept = [value for own in state.values() for value in own.values() if isinstance(value, torch.Tensor)]
    tensors = [*run.bundle.unet.parameters(), *run.bundle.unet.buffers(), *kept]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    import lora_kit.training.run  # noqa: F401 (all that a run imports)  # pyright: ignore[reportUnusedImport]

    sys.stdout.write(f"{json.dumps(_measured(json.loads(sys.argv[1])))}\n")
