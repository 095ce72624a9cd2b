"""Importing the large libraries with no more work than the command needs.

diffusers, transformers, PEFT and torch are some 3,000 modules: nearly all of a command's start. Much of it nobody can
leave out (diffusers' UNet brings PEFT, transformers and bitsandbytes along wherever they are installed). Two things in
it serve no run at all and are left out here.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_kit.allocator import few_held_back

if TYPE_CHECKING:
    from lora_kit.recipe import Recipe

_COMPILER_OFF = "TORCHDYNAMO_DISABLE"


@contextmanager
def quick_imports(*, compiles: bool = False) -> Generator[None]:
    """For the imports inside, and only for them: no garbage collection, and no compiler for what is decorated with
    `torch.compile`. Where diffusers is there already, this does nothing.

    What is imported lives as long as the process: collections find nothing in it, during the imports or
    later, so it is handed to the collector's permanent generation. bitsandbytes decorates CPU fall-backs of
    its kernels, and a decorator alone loads torch's whole inductor; under torch's own switch they stay
    plain functions for this process. Whatever calls `torch.compile` after the imports is compiled as ever.

    compiles: leave that switch alone, for a command that is going to call bitsandbytes. What the user set stays.
    """
    if "diffusers" in sys.modules:
        yield
        return
    collects, switches = gc.isenabled(), not compiles and _COMPILER_OFF not in os.environ
    gc.disable()
    if switches:
        os.environ[_COMPILER_OFF] = "1"
    try:
        yield
    finally:
        if switches:
            del os.environ[_COMPILER_OFF]
        if collects:
            gc.freeze()
            gc.enable()


def import_environment(recipe: Recipe) -> dict[str, str]:
    """Variables of a process that imports as a run of this recipe does under `quick_imports`, compiles nothing, and has
    a command's allocator."""
    return {**few_held_back(os.environ), **({} if uses_bitsandbytes(recipe) else {_COMPILER_OFF: "1"})}


def uses_bitsandbytes(recipe: Recipe) -> bool:
    """Whether the recipe asks for anything of bitsandbytes': weights in few bits, or one of its optimizers."""
    from lora_kit.recipe.optimizer import OPTIMIZERS  # here: `--help` reads no recipe

    named = OPTIMIZERS.get(recipe.optimizer.name)
    where = named.place if named is not None else recipe.optimizer.name
    return recipe.model.quantize != "none" or where.split(".")[0] == "bitsandbytes"
