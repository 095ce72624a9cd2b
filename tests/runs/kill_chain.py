"""Kill a run by SIGKILL at many points, resuming it each time, and compare it with one that was never stopped.

`python tests/runs/kill_chain.py RECIPE POINTS SEED` prints a line for each kill and one of JSON at the end. Every run
is a process of its own, forked from this one, which has imported everything and never computed anything: a start takes
a second, not five, and is the same from there on.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from lora_kit.cli.main import silence_libraries
from lora_kit.recipe import load_recipe

RESULTS = ("adapter.safetensors", "adapter.ema.safetensors", "result.json")
KINDS = ("step", "save", "step", "start", "save", "step", "rename")


class Watch(NamedTuple):
    """A run's folder, as its killer sees it."""

    run: Path

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        return max([0, *(json.loads(line)["step"] for line in lines if line.endswith("}") and '"loss"' in line)])

    def checkpoints(self) -> set[str]:
        """Names in checkpoints/: whole ones, hidden ones that are being written, and best."""
        try:
            return set(os.listdir(self.run / "checkpoints"))  # noqa: PTH208 (this is polled; names are enough)
        except FileNotFoundError:
            return set()

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(name.endswith(".tmp") for name in self.checkpoints())


def start(recipe: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        from lora_kit.training import train

        torch.set_num_threads(1)
        train(load_recipe(recipe, ["train.resume=latest"]))
        status = 0
    finally:
        if status:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)


def wait_until(pid: int, reached, seconds: float) -> bool:
    """Poll until `reached()`; False if the run ended, or the time did."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        if reached():
            return True
        time.sleep(0.0005)
    return False


def kill_at(pid: int, watch: Watch, kind: str, target: int, chance: random.Random) -> None:
    """Wait for the moment that `kind` and the target step name, and kill."""
    if kind == "start":
        time.sleep(chance.uniform(0.0, 2.0))  # loading, planning, encoding, or the first steps
    else:
        wait_until(pid, lambda: watch.step() >= target, 120)
        if kind == "step":
            time.sleep(chance.uniform(0.0, 0.25))  # a few steps long: forward, backward, update, validation, save
        else:
            before = watch.checkpoints()
            # Into the writing of a checkpoint, or to the moment when names change.
            wait_until(pid, watch.saving if kind == "save" else lambda: watch.checkpoints() != before, 20)
            time.sleep(chance.choice([0.0, 0.002, 0.01]))
    os.kill(pid, signal.SIGKILL)


def finish(recipe: str) -> int:
    pid = start(recipe)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digests(run: Path) -> dict[str, str]:
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    paths = [run / name for name in RESULTS] + [
        last / f"{name}.safetensors" for name in ("trainable", "optimizer", "ema")
    ]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def rows(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sorted(({k: v for k, v in row.items() if k != "samples_per_s"} for row in lines), key=str)


def main(recipe: str, points: int, seed: int) -> int:
    import lora_kit.training.run  # noqa: F401 (imported before the forks)

    loaded, chance = load_recipe(recipe), random.Random(seed)
    run, steps = Path(loaded.output_dir), loaded.train.max_steps
    assert finish(recipe) == 0
    whole, whole_rows = digests(run), rows(run)
    shutil.rmtree(run)
    watch, killed = Watch(run), Counter()
    for point in range(points):
        kind, target = KINDS[point % len(KINDS)], 1 + point * (steps - 1) // points
        pid = start(recipe)
        kill_at(pid, watch, kind, target, chance)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        left = sorted(name for name in watch.checkpoints() if not name.startswith("step-") and name != "best")
        killed["killed" if status == -signal.SIGKILL else "ended"] += 1
        killed["in a save"] += bool(left)
        print(f"{point + 1:3} {kind:6} at step {watch.step():3}, status {status}, left over: {', '.join(left) or '-'}")
        assert status in (0, -signal.SIGKILL), status
    assert finish(recipe) == 0
    same = {name: digest == whole[name] for name, digest in digests(run).items()}
    print(json.dumps({**killed, "same": same, "rows": rows(run) == whole_rows, "left": sorted(watch.checkpoints())}))
    return 0


if __name__ == "__main__":
    silence_libraries()
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
