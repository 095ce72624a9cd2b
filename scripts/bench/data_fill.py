"""Filling the cache: seconds and memory of `lora-kit cache` on synthetic pictures, by their number."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

CAPTIONS = 100
"""Distinct ones: the text encoder's work is bounded, that of pictures is what grows."""
A_FEW = 16
"""Pictures of the run whose time is the start-up's."""
_PER_FOLDER = 1000
_ANONYMOUS = re.compile(r"RssAnon:\s+(\d+) kB")


class Spent(NamedTuple):
    """What one command took."""

    seconds: float
    cpu: float
    """Seconds of all its threads: the same beside other work, as `seconds` is not."""
    peak: float
    """Resident memory, MB, mapped files' pages too."""
    anonymous: float
    """Its largest part that is no file's, MB, sampled 20 times a second."""


def table(counts: list[int], root: Path, workers: int) -> None:
    """Print a row for each number of pictures. `root` must have room: 30 KB a picture."""
    print("### Filling the cache: `lora-kit cache`, the tiny base, pictures of 64 px\n")
    print(f"A picture's cost is that beyond the start-up, which is the first row's. {workers} workers.\n")
    columns = (
        "pictures | seconds | CPU seconds | CPU ms a picture | peak MB | anonymous MB | again: seconds | CPU seconds"
    )
    print(f"| {columns} |")
    print("|---|---|---|---|---|---|---|---|")
    start = run_cache(write_set(root, A_FEW, workers))
    _row(A_FEW, start, "")
    for count in counts:
        recipe = write_set(root, count, workers)
        first = run_cache(recipe)
        _row(count, first, f"{1000 * (first.cpu - start.cpu) / count:.2f}", run_cache(recipe))


def _row(count: int, first: Spent, each: str, again: Spent | None = None) -> None:
    last = f"{again.seconds:.1f} | {again.cpu:.1f}" if again else "|"
    cells = f"{count:,} | {first.seconds:.1f} | {first.cpu:.1f} | {each} | {first.peak:.0f} | {first.anonymous:.0f}"
    print(f"| {cells} | {last} |", flush=True)


def write_set(root: Path, count: int, workers: int = 0) -> Path:
    """A folder of small pictures, all different, in `root`, with its recipe; nothing is written twice."""
    folder = root / str(count)
    recipe = folder / "recipe.yaml"
    if recipe.exists():
        return recipe
    draw = np.random.default_rng(0)
    for number in range(count):
        path = folder / "pictures" / f"{number // _PER_FOLDER:03}" / f"{number:06}.png"
        if number % _PER_FOLDER == 0:
            path.parent.mkdir(parents=True)
        coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.BILINEAR).save(path, compress_level=1)
        path.with_suffix(".txt").write_text(f"picture of kind {number % CAPTIONS}")
    sections = {
        "model": {"base": "tiny"},
        "data": {
            "sources": [{"path": "pictures"}],
            "resolution": 64,
            "batch_size": 4,
            "cache": "disk",
            "cache_dir": str(folder / "cache"),
            "workers": workers,
        },
        "train": {"max_steps": 10},
        "output_dir": str(folder / "run"),
    }
    recipe.write_text(json.dumps(sections))  # JSON is YAML
    return recipe


def run_cache(recipe: Path) -> Spent:
    """One cold `lora-kit cache`."""
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "lora_kit", "cache", str(recipe)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        anonymous, said = 0.0, b""
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            said = (said + (process.stderr.read() or b""))[-2000:]
            if ended:
                break
            anonymous = max(anonymous, _anonymous(process.pid))
            time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"lora-kit cache {recipe}: exit status {process.returncode}\n{said.decode()}")
    return Spent(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000, anonymous)


def _anonymous(process: int) -> float:
    """MB now; 0 once it has ended."""
    try:
        found = _ANONYMOUS.search(Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1000 if found else 0.0
