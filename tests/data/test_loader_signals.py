"""Loader processes outlive a signal to the group, and end with their parent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys, torch
from types import SimpleNamespace
from lora_kit.data import make_loader, open_training_set
from lora_kit.errors import DataError
from lora_kit.recipe import Recipe

data = {"sources": [{"path": sys.argv[1]}], "resolution": 16, "workers": 2}
recipe = Recipe.model_validate({"data": data, "train": {"max_steps": 40}})
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: None)
here = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
loader = make_loader(open_training_set(recipe.data, 0), recipe, here)
next(loader)
os.killpg(0, signal.SIGINT)
os.killpg(0, signal.SIGTERM)
for step in range(20):
    next(loader)
print("went on", flush=True)
raise DataError("the loader is still alive")
"""


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_workers_survive_group_signals_and_end_with_their_parent(picture_folder: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(picture_folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    # The limit only keeps a hang from stopping the whole test run.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert done.stdout == "went on\n", done.stderr
    assert done.stderr.rstrip().endswith("DataError: the loader is still alive")
