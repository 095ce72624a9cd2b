"""A second start: how long a fresh process takes until its first batch is ready, where everything is cached.

    python scripts/bench/data_start.py RECIPE STARTED

is the fresh process itself, started by `table`; STARTED is the parent's time.monotonic() at its start.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from data_fill import run_cache, write_set

PARTS = ("interpreter and imports", "base model", "data and cache", "first batch")
CPU = "its CPU seconds"
"""Of the last two parts: the same beside other work, as the others are not."""


def table(count: int, root: Path, starts: int) -> None:
    """Print a row for each start on `count` cached pictures."""
    recipe = write_set(root, count)
    run_cache(recipe)
    print(f"\n### A second start on {count:,} cached pictures, the tiny base: seconds\n")
    print(f"| start | {' | '.join(PARTS)} | **data, cache and batch** | {CPU} |\n|{'---|' * (len(PARTS) + 3)}")
    for number in range(1, starts + 1):
        seconds = start(recipe)
        cells = " | ".join(f"{seconds[part]:.2f}" for part in PARTS)
        print(
            f"| {number} | {cells} | **{seconds[PARTS[2]] + seconds[PARTS[3]]:.2f}** | {seconds[CPU]:.2f} |", flush=True
        )


def start(recipe: Path) -> dict[str, float]:
    """Seconds of each part in a fresh process."""
    command = [sys.executable, __file__, str(recipe), str(time.monotonic())]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(recipe_file: str, started: float) -> dict[str, float]:
    from lora_kit.data import make_loader
    from lora_kit.models import load_bundle
    from lora_kit.progress import no_progress
    from lora_kit.recipe import load_recipe
    from lora_kit.training.precision import base_dtype
    from lora_kit.training.prepared import prepare_data
    from lora_kit.training.processes.launch import build_accelerator

    times = [started, time.monotonic()]
    recipe = load_recipe(recipe_file)
    accelerator = build_accelerator(recipe)
    bundle = load_bundle(recipe.model, dtype=base_dtype(recipe), seed=recipe.seed)
    times.append(time.monotonic())
    cpu = time.process_time()
    data = prepare_data(recipe, bundle, False, accelerator, no_progress)
    times.append(time.monotonic())
    (batch,) = next(make_loader(data.training, recipe, accelerator))
    assert batch.is_latent.all(), "the cache was not filled"
    times.append(time.monotonic())
    return {part: times[i + 1] - times[i] for i, part in enumerate(PARTS)} | {CPU: time.process_time() - cpu}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], float(sys.argv[2]))))
