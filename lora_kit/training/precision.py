"""Which precision the base is held in."""

from __future__ import annotations

import torch

from lora_kit.recipe import Recipe
from lora_kit.recipe.rules import listed

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def base_dtype(recipe: Recipe) -> torch.dtype:
    """The frozen base is held in the autocast precision itself; weights that are trained stay fp32."""
    rules = listed(recipe.targets)
    whole = any(rule.method == "full" for rule in rules)
    return torch.float32 if whole else DTYPES[recipe.train.mixed_precision]
