"""The GPU benchmark runs on a CPU over a toy network; its figures are not looked at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lora_kit.training import compiling

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, "gpu", raising=False)
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    import gpu

    return gpu


@pytest.mark.slow
def test_every_variant_has_a_row_and_what_cannot_be_had_says_why(gpu, monkeypatch, capsys):
    options = "--device cpu --quick --batches 2 --precisions bf16 --rounds 1 --targets all"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options.split()])
    gpu.main()
    head, _, *table = capsys.readouterr().out.strip().splitlines()
    assert "toy network" in head
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table]
    assert {len(row) for row in rows} == {8}
    cases = [(row[1], row[2]) for row in rows[2:]]
    assert cases == [("2", variant) for variant in gpu.VARIANTS]
    assert "waiting" in gpu.VARIANTS
    for row in rows[2:]:
        if row[2] == "xformers":
            assert "xformers" in row[3]
        else:
            assert float(row[3]) > 0
            assert float(row[5]) > 0


def test_the_plain_step_trains_as_many_weights_as_ours(gpu):
    counts = set()
    for variant in ("plain", "eager"):
        options = type("Options", (), {"quick": True, "targets": "all"})
        network = gpu._network(gpu.Case(variant, "bf16", 1), options, torch.device("cpu"))
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        assert {weight.dtype for weight in trained} == {torch.float32}
        counts.add(sum(weight.numel() for weight in trained))
    assert len(counts) == 1
