"""A whole training job, from the start of the process to the saved adapter, against what a user would otherwise run.

    python scripts/bench/whole_job.py [--jobs quickstart,sd15] [--steps 200] [--sd15-steps 200] [--repeats 1]
    python scripts/bench/whole_job.py --only all       contenders whose `targets name` holds this text
    python scripts/bench/whole_job.py --precision no   fp32 throughout: for a CPU that does not compute in bf16
    python scripts/bench/whole_job.py --quick          does it run at all? Its figures mean nothing

Two jobs: recipes/quickstart.yaml, and SD 1.5's size (random weights, built once in --work) at 256 px, batch 1. Who
runs them: lora_kit; diffusers + PEFT as diffusers' example trains (job/plain.py: VAE and text encoder in every step);
LyCORIS in the same loop. All with the same pictures, size, batch, rank, targets, rate, clipping and AdamW. Each
is a cold process of its own, by turns; of several repeats the fastest counts. Nobody finds latents in a cache.

Ratios are of pictures a second, to diffusers + PEFT with autocast over fp32 (`--precision no`: in fp32 throughout) and
the same targets. The steady step is the median over the run's second half. Loss: mean of the first and the last 50
steps, of each one's own draws; held-out loss: of the saved files, by one measure (job/judge.py). Memory as in merge.py:
resident counts the mapped base's pages. Below the table: what as many bare passes of the frozen network would take
(job/bare.py), beside half of the reference's time, which is the goal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from job.jobs import BARE, Contender, Job, command, contenders, quickstart, sd15, settings
from merge import Cost, measure

from lora_kit.targeting import plan_from_json

ENDS = 50
"""Steps at either end whose loss is told."""
COLUMNS = (
    "job",
    "targets",
    "who",
    "pictures/s",
    "ratio",
    "seconds",
    "CPU s",
    "step, s",
    "anonymous MB",
    "resident MB",
    "trained",
    "loss first → last",
    "held-out",
)


class Run(NamedTuple):
    """What one process left."""

    cost: Cost
    step: float
    """Seconds, in the steady state."""
    losses: list[float]
    trained: int
    """Numbers."""
    adapter: Path


def run_once(job: Job, contender: Contender, out: Path) -> Run:
    cost = measure(command(job, contender, out))
    read = _ours if contender.method == "lora_kit" else _theirs
    return read(job, out, cost)


def _ours(job: Job, out: Path, cost: Cost) -> Run:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "samples_per_s" in line]
    seconds = [job.recipe.data.batch_size / line["samples_per_s"] for line in steps]
    trained = plan_from_json(json.loads((out / "plan.json").read_text())).trainable_parameters
    losses = [line["loss"] for line in steps]
    return Run(cost, _steady(seconds), losses, trained, out / "adapter.safetensors")


def _theirs(_: Job, out: Path, cost: Cost) -> Run:
    steps = json.loads((out / "steps.json").read_text())
    seconds = [after - before for before, after in pairwise(steps["ends"])]
    return Run(cost, _steady(seconds), steps["losses"], steps["trained"], out / "adapter.safetensors")


def _steady(seconds: list[float]) -> float:
    return statistics.median(seconds[len(seconds) // 2 :])


def rows(job: Job, asked: list[Contender], best: dict[Contender, Run]) -> list[str]:
    """A table row for each contender."""
    pictures = job.recipe.train.max_steps * job.recipe.data.batch_size
    references = {one.targets: best[one].cost.seconds for one in asked if one.is_reference}
    files = [best[one].adapter for one in asked]
    held_out = ["–"] * (len(files) + 1)
    if job.has_pretrained:
        from job.judge import held_out_losses

        held_out = [f"{loss:.4f}" for loss in held_out_losses(job.recipe, job.base, files)]
        print(f"held-out loss of the base: {held_out[0]}\n")
    found: list[str] = []
    for one, judged in zip(asked, held_out[1:], strict=True):
        cost, step, losses, trained, _ = best[one]
        reference = references.get(one.targets)
        ratio = f"{reference / cost.seconds:.2f}" if reference else "–"
        ends = f"{statistics.mean(losses[:ENDS]):.4f} → {statistics.mean(losses[-ENDS:]):.4f}"
        speed = f"{pictures / cost.seconds:.2f} | {ratio} | {cost.seconds:.1f} | {cost.cpu_seconds:.1f} | {step:.3f}"
        memory = f"{cost.anonymous_mb:,.0f} | {cost.resident_mb:,.0f}"
        found.append(
            f"| {job.name} | {one.targets} | {one.name} | {speed} | {memory} | {trained:,} | {ends} | {judged} |"
        )
    return found


def bare_passes(job: Job, ours: Contender, reference: float | None, root: Path) -> str:
    """The least that the job's steps could take, in words. reference: seconds of the process that `ours` is compared
    with."""
    root.mkdir()
    path = root / "settings.json"
    path.write_text(json.dumps(settings(job, ours, root)))
    subprocess.run([sys.executable, str(BARE), str(path)], check=True)
    bare, steps = json.loads((root / "bare.json").read_text()), job.recipe.train.max_steps
    least = steps * bare["seconds"]
    said = (
        f"{job.name}, {ours.targets}: {steps} bare passes of the frozen network, {bare['seconds']:.3f} s each, take "
        f"{least:.1f} s; an adapted step has {bare['work']:.3f} times as many multiplications, at that rate "
        f"{least * bare['work']:.1f} s"
    )
    return said if reference is None else f"{said}; half of the reference's time: {reference / 2:.1f} s"


def run_job(job: Job, only: str, repeats: int, root: Path, precision: str = "bf16") -> tuple[list[str], list[str]]:
    """The table's rows, and the lines below it."""
    asked = [one for one in contenders(job, precision) if only in f"{one.targets} {one.name}"]
    runs: dict[Contender, list[Run]] = {one: [] for one in asked}
    for repeat in range(repeats):
        for number, one in enumerate(asked):
            out = root / f"{job.name}-{number}-{repeat}".replace(" ", "")
            runs[one].append(run_once(job, one, out))
            shutil.rmtree(out / "datasets", ignore_errors=True)
    best = {one: min(found, key=lambda run: run.cost.seconds) for one, found in runs.items()}
    for targets in ("attention", "all"):
        counts = {run.trained for one, run in best.items() if one.targets == targets}
        assert len(counts) <= 1, f"{job.name}, {targets}: the contenders train {counts} numbers"
    floors: list[str] = []
    for number, one in enumerate(one for one in asked if one.method == "lora_kit" and one.overrides):
        same = [run for other, run in best.items() if other.is_reference and other.targets == one.targets]
        root_of_it = root / f"{job.name}-bare-{number}".replace(" ", "")
        floors.append(bare_passes(job, one, same[0].cost.seconds if same else None, root_of_it))
    return rows(job, asked, best), floors


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    steps, sd15_steps = (2, 2) if options.quick else (options.steps, options.sd15_steps)
    builders = {
        "quickstart": lambda: quickstart(steps, options.quick),
        "sd15": lambda: sd15(sd15_steps, options.work, options.quick, options.precision),
    }
    print(f"{os.cpu_count()} cores, load before: {os.getloadavg()[0]:.1f}\n")
    found, floors = list[str](), list[str]()
    for name in options.jobs.split(","):
        job = builders[name]()
        print(f"{job.name}: {job.recipe.train.max_steps} steps, batch {job.recipe.data.batch_size}", flush=True)
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            made = run_job(job, options.only, options.repeats, Path(folder), options.precision)
            found, floors = [*found, *made[0]], [*floors, *made[1]]
    print(f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    print("\n".join([*found, "", *floors]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="quickstart,sd15")
    parser.add_argument("--only", default="", help="contenders whose `targets name` holds this text")
    parser.add_argument("--steps", type=int, default=200, help="of the quickstart")
    parser.add_argument("--sd15-steps", type=int, default=200, help="of SD 1.5's size: minutes each at 200")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="of SD 1.5's size and autocast")
    parser.add_argument("--repeats", type=int, default=1)
    work = Path(tempfile.gettempdir()) / "lora_kit_whole_job"
    parser.add_argument("--work", type=Path, default=work, help="where to work; SD 1.5's base (2.4 GB) is kept there")
    parser.add_argument("--quick", action="store_true", help="narrow networks and two steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
