"""How long each command takes to start, and a run until its first optimizer step: medians of cold processes.

    python scripts/bench/start.py [--repeats 5] [--only commands,step,stages]

Three tables. `commands`: whole processes. `step`: from a process's start until its first step is in metrics.jsonl,
read from outside, then ended; the quickstart recipe without its validation, every picture and caption in the cache;
beside it a plain loop as diffusers' text-to-image LoRA example imports and begins it (no cache: VAE and text encoder in
the step). `stages`: where that time goes, told by a process whose functions this script wraps. The rounds interleave
the rows. Linux: CPU seconds are read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from plan import BASES, write_base

from lora_kit.recipe.yaml12 import dump, parse

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "scripts" / "train_lora.py"
PICTURES = ROOT / "recipes" / "data" / "openmoji-line"
PLAIN = Path(__file__).with_name("start_plain.py")
LAUNCH = ("-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1", "--mixed_precision", "no")
STAGES = ("recipe checked", "imports", "base loaded", "data and cache", "adapters in", "first step")
LIMIT_S = 300.0


class Cost(NamedTuple):
    """Of one process, or of its part until something was seen."""

    wall: float
    cpu: float
    """User and system seconds, of its children too."""


def recipe_text(base: str, folder: Path) -> str:
    """recipes/quickstart.yaml on `base` and the disk's cache, without its validation and checkpoints."""
    tree: Any = parse((ROOT / "recipes" / "quickstart.yaml").read_text(), "quickstart.yaml")
    del tree["validation"], tree["save"]
    tree["model"]["base"] = base
    tree["data"]["sources"] = [{"path": str(PICTURES)}]
    tree["data"] |= {"cache": "disk", "cache_dir": str(folder / "cache")}
    tree["train"]["log_every"] = 1
    tree["output_dir"] = str(folder / "out")
    return dump(tree)


def whole(command: list[str], status: int = 0) -> Cost:
    """A process from its start to its end, which must be `status`."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, ended, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(ended)
        said.seek(0)
        assert process.returncode == status, f"{command}: exit status {process.returncode}:\n{said.read()}"
    return Cost(wall, usage.ru_utime + usage.ru_stime)


def until_first_step(command: list[str], out: Path, mark: str = '"loss"') -> Cost:
    """A training process from its start until `out`/metrics.jsonl holds `mark`, its first step's; ended then."""
    metrics = out / "metrics.jsonl"
    shutil.rmtree(out, ignore_errors=True)  # the last one's, in this script's own temporary folder
    out.mkdir()
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=out.parent
    )
    try:
        while not (metrics.is_file() and mark in metrics.read_text()):
            assert process.poll() is None, f"{command}: ended with {process.returncode} before {mark}"
            assert time.monotonic() - started < LIMIT_S, f"{command}: no {mark} in {LIMIT_S:g} s"
            time.sleep(0.005)
        return Cost(time.monotonic() - started, group_cpu(process.pid))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own session, begun above
        process.wait()


def group_cpu(group: int) -> float:
    """User and system seconds so far of the living processes of a group."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        if int(fields[2]) == group:
            ticks += sum(map(int, fields[11:15]))  # utime, stime, and those of ended children: proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


def rows_of_commands(folder: Path) -> dict[str, Callable[[], Cost]]:
    """Label → one cold process."""
    kit = [sys.executable, "-m", "lora_kit"]
    recipe, adapter = folder / "tiny.yaml", folder / "adapter" / "adapter.safetensors"
    write_base(folder / "sd15", *BASES["SD 1.5"])
    (folder / "sd15.yaml").write_text(recipe_text(str(folder / "sd15"), folder))
    (folder / "wrong.yaml").write_text(recipe.read_text() + "sead: 0\n")
    draw = [*kit, "generate", "tiny", "--prompt", "red apple", "--steps", "1", "--adapter", str(adapter), "--out"]
    merge = [*kit, "merge", "tiny", "--adapter", str(adapter), "--out"]
    return {
        "`import torch`, to compare machines": lambda: whole([sys.executable, "-c", "import torch"]),
        "`lora-kit --help`": lambda: whole([*kit, "--help"]),
        "`lora-kit schema`": lambda: whole([*kit, "schema"]),
        "a misspelt key, to its error": lambda: whole([sys.executable, str(TRAIN), str(folder / "wrong.yaml")], 2),
        "`lora-kit plan`, tiny base": lambda: whole([*kit, "plan", str(recipe)]),
        "`lora-kit plan`, SD 1.5": lambda: whole([*kit, "plan", str(folder / "sd15.yaml")]),
        "`lora-kit merge`, tiny base": lambda: whole([*merge, tempfile.mkdtemp(dir=folder) + "/merged"]),
        "`lora-kit generate`, tiny base, one step": lambda: whole([*draw, tempfile.mkdtemp(dir=folder) + "/drawn"]),
    }


def rows_of_steps(folder: Path) -> dict[str, Callable[[], Cost]]:
    """Label → the first step of one process."""
    recipe, out = str(folder / "tiny.yaml"), folder / "out"
    plain = [sys.executable, str(PLAIN), str(ROOT / "lora_kit" / "assets" / "tiny_base")]
    return {
        "`python scripts/train_lora.py`": lambda: until_first_step([sys.executable, str(TRAIN), recipe], out),
        "`accelerate launch scripts/train_lora.py`": lambda: until_first_step(
            [sys.executable, *LAUNCH, "--dynamo_backend", "no", str(TRAIN), recipe], out
        ),
        "plain diffusers + PEFT": lambda: until_first_step([*plain, str(PICTURES), str(out)], out),
        "of that, its imports": lambda: until_first_step(
            [*plain[:2], "--imports", str(PICTURES), str(out)], out, '"imported"'
        ),
    }


def staged(folder: Path) -> dict[str, Cost]:
    """What each stage of one run took."""
    shutil.rmtree(folder / "out", ignore_errors=True)  # the last one's
    command = [sys.executable, __file__, "--child", str(folder / "tiny.yaml"), str(time.monotonic())]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    return {name: Cost(*cost) for name, cost in json.loads(done.stdout.splitlines()[-1]).items()}


def child(recipe_file: str, started: float) -> None:
    """Train until the first step and print each stage's seconds; imports nothing before the recipe is checked."""
    marks = [Cost(started, 0.0)]

    def mark() -> None:
        marks.append(Cost(time.monotonic(), time.process_time()))

    def marking(module: Any, name: str) -> None:
        original = getattr(module, name)

        def marked(*arguments: Any, **named: Any) -> Any:
            result = original(*arguments, **named)
            mark()
            if len(marks) == len(STAGES) + 1:
                pairs = pairwise(marks)
                parts = [Cost(after.wall - before.wall, after.cpu - before.cpu) for before, after in pairs]
                print(json.dumps(dict(zip(STAGES, parts, strict=True))), flush=True)
                os._exit(0)  # what follows is no part of a start
            return result

        setattr(module, name, marked)

    from lora_kit.cli.main import silence_libraries
    from lora_kit.cli.quick_imports import quick_imports, uses_bitsandbytes
    from lora_kit.recipe import load_recipe

    silence_libraries()
    recipe = load_recipe(recipe_file)
    mark()
    with quick_imports(compiles=uses_bitsandbytes(recipe)):
        from lora_kit.training import build, run
    mark()
    for name in ("load_bundle", "prepare_data", "make_trainable"):
        marking(build, name)
    marking(run, "take_step")
    run.train(recipe)


def medians(found: Mapping[str, list[Cost]]) -> dict[str, Cost]:
    return {
        label: Cost(*(statistics.median(column) for column in zip(*costs, strict=True)))
        for label, costs in found.items()
    }


def table(title: str, found: Mapping[str, list[Cost]], columns: tuple[str, str, str]) -> None:
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|---|---|---|")
    for label, cost in medians(found).items():
        print(f"| {label} | {cost.wall:.2f} | {cost.cpu:.2f} |", flush=True)


def measured(rows: Mapping[str, Callable[[], Cost]], repeats: int) -> dict[str, list[Cost]]:
    """Each row as often as asked, in rounds. The first round only warms the disk's cache."""
    found: dict[str, list[Cost]] = {label: [] for label in rows}
    for number in range(repeats + 1):
        for label, run in rows.items():
            cost = run()
            if number:
                found[label].append(cost)
    return found


def with_whole(stages: list[dict[str, Cost]]) -> dict[str, list[Cost]]:
    """Stage → its costs, and a last row that holds the sums."""
    found = {name: [one[name] for one in stages] for name in STAGES}
    sums = [Cost(*(sum(column) for column in zip(*one.values(), strict=True))) for one in stages]
    return found | {"**all**": sums}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="commands,step,stages")
    options = parser.parse_args()
    wanted = set(options.only.split(","))
    columns = ("", "seconds", "CPU seconds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "tiny.yaml"
        recipe.write_text(recipe_text("tiny", folder))
        whole([sys.executable, "-m", "lora_kit", "cache", str(recipe)])
        if "commands" in wanted:
            one = [str(recipe), "train.max_steps=1", "schedule.warmup_steps=0", f"output_dir={folder / 'adapter'}"]
            whole([sys.executable, str(TRAIN), *one])
            found = measured(rows_of_commands(folder), options.repeats)
            table("**Commands**, whole processes.", found, columns)
        if "step" in wanted:
            table("**To the first step**.", measured(rows_of_steps(folder), options.repeats), columns)
        if "stages" in wanted:
            stages = [staged(folder) for _ in range(options.repeats + 1)][1:]
            table("**Where it goes**.", with_whole(stages), ("stage", *columns[1:]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], float(sys.argv[3]))
    else:
        main()
