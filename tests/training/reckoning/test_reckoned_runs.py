"""What is reckoned beforehand is what a run then takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

QUICKSTART = Path(__file__).resolve().parents[3] / "recipes" / "quickstart.yaml"
SHORT = ("train.max_steps=3", "schedule.warmup_steps=1", "save.every=0", "validation={every: 0}")


BF16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="torch's own kernels compute bf16, and their code is not oneDNN's",
)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peaks")
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param((), id="as it is"),
        pytest.param(("train.gradient_checkpointing=true",), id="checkpoints"),
        pytest.param(("train.mixed_precision=bf16",), marks=BF16, id="bf16"),
    ],
)
def test_the_quickstart_takes_what_is_reckoned_within_15_percent(tmp_path: Path, changes: tuple[str, ...]) -> None:
    told = _run("plan", *SHORT, *changes, "--memory", "--json")
    reckoned = json.loads(told.stdout)["memory_bytes"]["expected_peaks"]
    done = _run("train", *SHORT, *changes, f"output_dir={tmp_path / 'run'}")
    line = next(line for line in (done.stdout + done.stderr).splitlines() if line.startswith("peak memory: "))
    taken = {stage: int(size.replace(",", "")) * 2**20 for stage, size in re.findall(r"(\w+) ([\d,]+)[,;]", line)}
    for stage in ("start", "steps"):
        assert reckoned[stage] == pytest.approx(taken[stage], rel=0.15), line


SCRATCH = """
import torch
from lora_kit.allocator import give_back_freed
from lora_kit.training.peak_memory import peak_memory, reset_peak, resident_memory
from lora_kit.training.reckoning.live_bytes import LiveBytes
from lora_kit.training.reckoning.scratch import cpu_scratch
cpu = torch.device("cpu")
def shown(dtype, layout, outputs, inputs, side):
    x = torch.ones(1, inputs, side, side, dtype=dtype).to(memory_format=layout).requires_grad_()
    weight = torch.ones(outputs, inputs, 3, 3, dtype=dtype).to(memory_format=layout)
    for _ in range(2):  # the first call brings the kernel's code
        give_back_freed()
        reset_peak(cpu)
        before = resident_memory()
        with LiveBytes([x, weight], cpu_scratch) as live:
            torch.nn.functional.conv2d(x, weight, padding=1)
        taken = peak_memory(cpu) - before
    print(live.peak, taken)
shown(torch.float32, torch.channels_last, 1280, 1280, 8)
if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # else torch's own kernels compute bf16
    shown(torch.bfloat16, torch.channels_last, 1280, 2560, 4)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peaks")
def test_a_convolution_takes_what_is_reckoned_of_its_scratch() -> None:
    command = [sys.executable, "-c", SCRATCH]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=one)
    for line in done.stdout.splitlines():
        reckoned, taken = map(int, line.split())
        assert reckoned == pytest.approx(taken, rel=0.1), done.stdout
    assert done.stdout


def _run(command: str, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "lora_kit", command, str(QUICKSTART), *options]
    return subprocess.run(arguments, capture_output=True, text=True, check=True)
