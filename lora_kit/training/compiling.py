"""Compiled blocks (`train.compile`): torch.compile of what a UNet repeats, for training steps alone.

Block by block ("regional compilation"), a class's forward is traced once for each form that its blocks have and each
shape of a micro-batch, not once for each block, and the whole network is never one graph. Shapes are static.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from lora_kit.data.buckets import Size
from lora_kit.errors import RecipeError, TrainingError
from lora_kit.models import ModelBundle
from lora_kit.models.repeated_blocks import CompilePlan, compile_plan, repeated_blocks
from lora_kit.recipe import Recipe
from lora_kit.recipe.compiling import batch_lengths
from lora_kit.targeting import ModuleInfo, TargetPlan

BACKEND: Any = "inductor"
_INDUCTOR: dict[str, Any] = {"fallback_random": True}
"""Dropout draws what it draws uncompiled: a run with it is the same run."""
_FIX = "set `train.compile: false`"


def check_compile(recipe: Recipe, device: torch.device) -> None:
    """`check_device`, if the recipe compiles."""
    if recipe.train.compile:
        check_device(device)


def check_device(device: torch.device) -> None:
    """Compile and run one small function on `device`. Raises RecipeError where that fails."""
    try:
        small = torch.compile(nn.functional.silu, backend=BACKEND, dynamic=False, fullgraph=True)
        small(torch.ones(8, device=device, requires_grad=True)).sum().backward()
    except (RuntimeError, ImportError, OSError) as error:
        needs = {"cpu": "a C++ compiler (g++)", "cuda": "triton (`pip install triton`) and a C compiler (gcc)"}
        wanted = needs.get(device.type, "an inductor backend for it")
        raise RecipeError(
            f"train.compile: torch.compile does not work here on the device `{device.type}`: {_first_line(error)} It "
            f"needs {wanted} and Python's header files. Install what is missing, or {_FIX}."
        ) from error


def compile_blocks(
    recipe: Recipe,
    bundle: ModelBundle,
    tree: Iterable[ModuleInfo],
    plan: TargetPlan,
    sizes: Sequence[Size],
    processes: int = 1,
) -> CompilePlan | None:
    """`compile_network` for all shapes of the run's micro-batches, if the recipe compiles. sizes: of the pictures."""
    if not recipe.train.compile:
        return None
    return compile_network(bundle.unet, tree, plan, len(sizes) * batch_lengths(recipe, processes))


def compile_network(unet: nn.Module, tree: Iterable[ModuleInfo], plan: TargetPlan, shapes: int) -> CompilePlan:
    """Let the UNet's repeated blocks run compiled in training steps; what that makes.

    Names of weights stay as they are. Nothing is compiled yet: each piece of code when it is first needed. Must come
    after adapters are in. tree: of the network without them; shapes: how many a micro-batch may have.
    """
    tree = list(tree)
    found = compile_plan(tree, plan, shapes)
    torch.compiler.reset()  # an earlier run's code in this process would count towards this one's limit
    config = cast(Any, torch)._dynamo.config
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, found.limit)
    for block in repeated_blocks(tree):
        module = unet.get_submodule(block.name.removeprefix("unet."))
        module.compile(
            backend=BACKEND,
            dynamic=False,
            fullgraph=True,
            recompile_limit=found.limit,
            options=_INDUCTOR if BACKEND == "inductor" else None,
        )
        own = cast(Any, module)
        own._compiled_call_impl = _in_steps(block.name, module, own._compiled_call_impl)
    return found


def _in_steps(name: str, block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The block's compiled call in training steps, and its own otherwise.

    Validation sets strengths, batches and sizes of its own, each of which would be compiled; so would a base's
    prediction, its adapters off.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and block.training):
            return cast(Any, block)._call_impl(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except cast(Any, torch)._dynamo.exc.TorchDynamoException as error:
            raise TrainingError(
                f"train.compile: torch could not compile {name}: {_first_line(error)} What was trained up to the last "
                f"checkpoint is there: {_FIX} and go on with train.resume=latest."
            ) from error

    return call


def _first_line(error: BaseException) -> str:
    error = getattr(error, "inner_exception", error)  # what torch says `backend='…' raised:` of
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return first if first.endswith(".") else f"{first}."
