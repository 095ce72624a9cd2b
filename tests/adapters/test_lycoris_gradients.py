"""Gradients of the methods that train through our own expressions, against `lycoris-lora`'s modules.

DoRA is none of them: its paper and PEFT take the norm for a constant in the backward pass, LyCORIS does not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_lycoris_modules import CASES, IN, U, read

from lora_kit.adapters.formats.lycoris import SUFFIX_OF
from lora_kit.adapters.updates import build_update

METHODS = [name for name in CASES if name.split()[0] in ("loha", "lokr", "oft", "boft")]


@pytest.mark.parametrize("name", [name for name in METHODS if "constraint" not in name and "dora" not in name])
def test_every_part_has_lycoris_gradient(name: str, tmp_path: Path) -> None:
    pair = read(CASES[name], tmp_path)
    theirs = pair.theirs.train()
    inputs = torch.randn(2, IN, 5, 5, generator=torch.Generator().manual_seed(1))
    if theirs.module_type in ("linear", "layernorm"):
        inputs = inputs.permute(0, 2, 3, 1).contiguous()
    theirs(inputs).square().sum().backward()
    parts = {part: one.double().requires_grad_() for part, one in pair.update.parts().items()}
    update = build_update(dict(parts), pair.update.alpha, tuple(pair.weight.shape))
    weight, bias = pair.weight.double(), None if pair.bias is None else pair.bias.double()
    delta, change = update.weight_delta(1.0, weight, torch.float64), update.bias_delta(1.0, bias, torch.float64)
    assert delta is not None
    whole = None if bias is None else bias + (0 if change is None else change)
    theirs.op(inputs.double(), weight=weight + delta, bias=whole, **theirs.kw_dict).square().sum().backward()
    gradients = {key: one.grad for key, one in theirs.named_parameters()}
    for part, own in parts.items():
        wanted = gradients[SUFFIX_OF[part]]
        assert own.grad is not None and wanted is not None, part
        # fp32 sums over the inputs' positions and a weight's row, there and back; each term rounds.
        terms = inputs.numel() // IN * pair.weight[0].numel()
        assert float(own.grad.abs().max()) > 0
        off = (wanted.double().reshape(own.grad.shape) - own.grad).abs().max() / own.grad.abs().max()
        assert float(off) < terms * U, part
