"""The quickstart's figures for every method at equal steps, as a table for docs/methods.md.

    python scripts/bench/methods.py --work runs/methods [--methods lora,dora,…] [--steps 240]
    python scripts/bench/methods.py --work runs/methods --timing      # with nothing else running

The first trains recipes/quickstart.yaml once with each method, a process each; a method whose run in the work folder is
complete is not run again. `--timing` measures a training step of all methods in one process, by turns, and then prints
the table too. Only the method and its rate differ between the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart.yaml"


class Method(NamedTuple):
    """What differs from the recipe."""

    overrides: tuple[str, ...]
    rate: float
    """The recipe's for the LoRA family; for the others a first guess, not tuned."""


METHODS = {
    "lora": Method((), 1e-3),
    "rslora": Method(("targets.method=rslora",), 1e-3),
    "dora": Method(("targets.method=dora",), 1e-3),
    "loha": Method(("targets.method=loha",), 1e-3),
    "lokr": Method(("targets.method=lokr",), 1e-3),
    "oft": Method(("targets.method=oft",), 1e-3),
    "boft": Method(("targets.method=boft",), 1e-3),
    "diff": Method(("targets.method=diff",), 1e-4),
    "full": Method(("targets.method=full",), 1e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; kept")
    parser.add_argument("--methods", default="lora,dora,loha,lokr,full", help="comma-separated")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--timing", action="store_true", help="measure seconds a step, in this process")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each method that are timed")
    options = parser.parse_args()
    names = options.methods.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(METHODS)}")
    options.work.mkdir(parents=True, exist_ok=True)
    if options.timing:
        seconds = timed(names, options.rounds)
        (options.work / "timing.json").write_text(json.dumps(seconds))
    else:
        for name in names:
            train(name, options.work / name, options.steps)
    print(table(options.work, names))


def train(name: str, folder: Path, steps: int) -> None:
    """Run the recipe with a method, unless its result is there."""
    if (folder / "result.json").is_file():
        return
    method = METHODS[name]
    overrides = [*method.overrides, f"optimizer.lr={method.rate}", f"train.max_steps={steps}", f"output_dir={folder}"]
    resumed = ["train.resume=latest"] if folder.is_dir() else []
    command = [sys.executable, ROOT / "scripts" / "train_lora.py", RECIPE, *overrides, *resumed]
    subprocess.run([str(part) for part in command], check=True)


def timed(names: list[str], rounds: int) -> dict[str, float]:
    """Median seconds of a training step; the methods take turns, so that another load falls on all alike."""
    from lora_kit.data import make_loader
    from lora_kit.recipe import load_recipe
    from lora_kit.training.build import build_run
    from lora_kit.training.processes.launch import build_accelerator, use_cores
    from lora_kit.training.step import training_step

    found: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        runs: dict[str, Any] = {}
        for name in names:
            overrides = [*METHODS[name].overrides, f"optimizer.lr={METHODS[name].rate}", f"output_dir={temporary}"]
            recipe = load_recipe(RECIPE, overrides)
            accelerator = build_accelerator(recipe)
            use_cores(accelerator)
            run = build_run(recipe, accelerator)
            runs[name] = (run, make_loader(run.data, recipe, run.accelerator))
        for step in range(rounds + 2):
            for name, (run, loader) in runs.items():
                batches = next(loader)
                start = time.perf_counter()
                training_step(run.learner, batches, step)
                if step >= 2:  # the first steps make room for gradients and moments
                    found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def table(work: Path, names: list[str]) -> str:
    """Markdown. What was not run has no row; what was not timed has a dash."""
    timing = work / "timing.json"
    seconds = json.loads(timing.read_text()) if timing.is_file() else {}
    rows = [
        "| method | rate | parameters | file, MB | held-out loss (base) | paired difference | saturation | top-1, % "
        "| top-5, % | s / step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*rows, *(row(work / name, name, seconds) for name in names if (work / name).is_dir())])


def row(folder: Path, name: str, seconds: dict[str, float]) -> str:
    """One run's figures."""
    result = json.loads((folder / "result.json").read_text())
    plan = json.loads((folder / "plan.json").read_text())
    step = f"{seconds[name]:.3f}" if name in seconds else "–"
    cells = [
        name,
        f"{METHODS[name].rate:g}",
        f"{parameters(plan) / 1e6:.2f} M",
        f"{size(folder) / 1e6:.1f}",
        f"{result['held_out_loss']:.4f} ({result['held_out_base_loss']:.4f})",
        f"{result['held_out_difference']:+.4f} ± {result['held_out_standard_error']:.4f}",
        f"{result['saturation_at_1']:.2f}",
        f"{100 * result['top1_at_1']:.1f}",
        f"{100 * result['top5_at_1']:.1f}",
        step,
    ]
    return f"| {' | '.join(cells)} |"


def parameters(plan: dict[str, Any]) -> int:
    """Trainable parameters of a plan.json."""
    from lora_kit.targeting.plan import plan_from_json

    return plan_from_json(plan).trainable_parameters


def size(folder: Path) -> int:
    """Bytes of the result: the adapter, or the whole model's folder."""
    adapter = folder / "adapter.safetensors"
    if adapter.is_file():
        return adapter.stat().st_size
    return sum(file.stat().st_size for file in (folder / "model").rglob("*") if file.is_file())


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
