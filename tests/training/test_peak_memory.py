"""What a run says of its memory, and memory that is freed and given back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_kit.training import peak_memory as module
from lora_kit.training.peak_memory import RunPeak

FRAGMENTS = """
import torch
from lora_kit.allocator import give_back_freed
from lora_kit.training.peak_memory import resident_memory
blocks = [torch.ones(8192) for _ in range(4000)]  # 32 KiB each: of the heap, not mapped by themselves
held = blocks[::100]  # keeps the heap's end where it is
before = resident_memory()
del blocks
kept = resident_memory()
give_back_freed()
print(before - kept, before - resident_memory())
"""


def test_the_line_names_the_largest_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: Iterator[int] = iter(size * 2**20 for size in (500, 700, 900, 800))
    monkeypatch.setattr(module, "peak_memory", lambda device: next(sizes))
    peak = RunPeak(torch.device("cpu"))
    for stage in ("start", "steps", "steps", "result"):
        with peak.watching(stage):
            pass
    (line,) = peak.line()
    assert line.startswith("peak memory: 900.0 MiB resident, in its steps (start 500, steps 900, result 800;")


def test_where_the_system_does_not_tell_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "peak_memory", lambda device: None)
    peak = RunPeak(torch.device("cpu"))
    with peak.watching("steps"):
        pass
    assert peak.line() == []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells what is resident")
def test_freed_memory_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", FRAGMENTS], capture_output=True, text=True, check=True)
    kept, given = map(int, done.stdout.split())
    blocks = 4000 * 32 * 2**10
    assert given > 0.8 * blocks, f"freeing alone gave back {kept}"
