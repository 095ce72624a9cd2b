"""Threads of a run on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
from accelerate import Accelerator

from lora_kit.training.processes.launch import use_cores

CORES = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "OMP_NUM_THREADS": "1"}, CORES),  # the launcher's own default
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(CORES)}, 1),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "OMP_NUM_THREADS": "3"}, 1),  # asked for: left as torch has it
        ({"OMP_NUM_THREADS": "1"}, 1),  # asked for, without the launcher
    ],
)
def test_the_launchers_single_thread_becomes_all_cores_and_no_other_choice_is_touched(
    monkeypatch, environment, expected
):
    accelerator = Accelerator(cpu=True)
    for name in ("ACCELERATE_DYNAMO_BACKEND", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(1)
    use_cores(accelerator)
    assert torch.get_num_threads() == expected
