"""Which precision the base is held in, and whether the machine computes in it."""

from __future__ import annotations

import torch

from lora_kit.arithmetic.bf16 import computes_bf16
from lora_kit.recipe import Recipe
from lora_kit.recipe.rules import listed

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def base_dtype(recipe: Recipe) -> torch.dtype:
    """The frozen base is held in the autocast precision itself; weights that are trained stay fp32."""
    rules = listed(recipe.targets)
    whole = any(rule.method == "full" for rule in rules)
    return torch.float32 if whole else DTYPES[recipe.train.mixed_precision]


def precision_notices(recipe: Recipe, device: torch.device) -> list[str]:
    """What the user should be told: of bf16, on a CPU that oneDNN does not compute it on. A tiny base's step took 5
    times as long there as in fp32, with an AVX2 processor and torch 2.13."""
    if recipe.train.mixed_precision != "bf16" or device.type != "cpu" or computes_bf16():
        return []
    return [
        "train.mixed_precision: bf16 takes several times as long as fp32 on this CPU, which has no instructions that "
        "torch could use for it (AVX-512 on x86). What it saves is memory: if the base fits in fp32, set "
        "`train.mixed_precision: no`."
    ]
