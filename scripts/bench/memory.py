"""What each way of saving memory saves and costs, at Stable Diffusion 1.5's size, and how well `plan` reckons it.

    python scripts/bench/memory.py [--only "nf4,all together"] [--pixels 256] [--steps 3] [--folder DIR] [--quick]

The base has random weights in bf16 and is saved as its diffusers pipeline is. Each row is a process of its own, which
builds a run (attention targets, rank 16, batch 1, bf16) and takes `--steps` steps on made-up pictures: the most that
was resident and anonymous in them, CPU seconds of a step (the median of all but the first), and, from a `lora-kit plan`
of the same recipe before, what was reckoned. `--folder` keeps the base for the next time. `--quick`: narrow networks,
to see that the script runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from families import stable_diffusion
from PIL import Image

CHECKPOINTS, EIGHT_BITS, NF4 = "train.gradient_checkpointing=true", "optimizer.name=adamw8bit", "model.quantize=nf4"
KEPT = "data.cache=memory"
ROWS: dict[str, tuple[str, ...]] = {
    "nothing": ("data.cache=none",),
    "latents and text states kept": (KEPT,),
    "gradient checkpointing": (KEPT, CHECKPOINTS),
    "8-bit optimizer": (KEPT, EIGHT_BITS),
    "nf4": (KEPT, NF4),
    "int8": (KEPT, "model.quantize=int8"),
    "all together": (KEPT, CHECKPOINTS, EIGHT_BITS, NF4),
}


def main() -> None:
    options = _options()
    if options.row:
        print(json.dumps(measured(options.row, options.steps)))
        return
    with tempfile.TemporaryDirectory() as place:
        recipe = _recipe(Path(options.folder or place), Path(place), options)
        print("| saved by | reckoned MB | resident MB | ratio | anonymous MB | while loading | CPU s a step |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for name in options.only.split(",") if options.only else ROWS:
            overrides = ROWS[name]
            plan = _json(["-m", "lora_kit", "plan", recipe, *overrides, "--memory", "--json"])
            reckoned = plan["memory_bytes"]["expected_peak"]
            row = json.dumps([recipe, *overrides])
            found = _json([__file__, "--row", row, "--steps", str(options.steps)])
            sizes = [f"{size / 1e6:,.0f}" for size in (reckoned, found["resident"])]
            cells = [*sizes, f"{reckoned / found['resident']:.2f}", f"{found['anonymous'] / 1e6:,.0f}"]
            cells += [f"{found['loading'] / 1e6:,.0f}", f"{found['cpu_seconds']:.2f}"]
            print("| " + " | ".join([name, *cells]) + " |", flush=True)


def measured(row: str, steps: int) -> dict[str, float]:
    """Bytes and CPU seconds of one row, in this process."""
    from lora_kit.recipe import load_recipe
    from lora_kit.training.build import build_run
    from lora_kit.training.peak_memory import StepPeak, peak_memory
    from lora_kit.training.probe import made_up, stand_in_data
    from lora_kit.training.processes.launch import build_accelerator
    from lora_kit.training.step import training_step

    path, *overrides = json.loads(row)
    recipe = load_recipe(path, overrides)
    accelerator = build_accelerator(recipe)
    run = build_run(recipe, accelerator, resumes=True, data=stand_in_data(recipe))
    loading = peak_memory(accelerator.device) or 0
    batches, seconds, peak = made_up(run, accelerator), list[float](), StepPeak(accelerator.device)
    with _most_anonymous() as most:
        for step in range(steps):
            began = time.process_time()
            with peak.watching():
                training_step(run.learner, batches, step)
            seconds.append(time.process_time() - began)
    cpu = statistics.median(seconds[1:] or seconds)
    return {"resident": peak.bytes or 0, "anonymous": max(most), "loading": loading, "cpu_seconds": cpu}


@contextmanager
def _most_anonymous() -> Generator[list[int]]:
    """The largest RssAnon that was seen, looked at fifty times a second."""
    most, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            most[0] = max(most[0], int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) * 1024)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def _json(arguments: list[str]) -> dict[str, float]:
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1] if arguments[0] == __file__ else done.stdout)


def _recipe(folder: Path, place: Path, options: argparse.Namespace) -> str:
    base = folder / ("sd15-quick" if options.quick else "sd15-bf16")
    if not base.is_dir():
        stable_diffusion("SD 1.5", {}, {}, options.quick).save_pretrained(base)
    (place / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(place / "pictures" / "a.png")
    (place / "pictures" / "a.txt").write_text("a picture")
    recipe = {
        "model": {"base": str(base)},
        "targets": {"preset": "attention", "rank": 16},
        "data": {"sources": [{"path": "pictures"}], "resolution": options.pixels, "batch_size": 1},
        "train": {"mixed_precision": "bf16", "trackers": []},
        "output_dir": "out",
    }
    path = place / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return str(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"rows, comma-separated: {', '.join(ROWS)}")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", help="where the base is, or is kept")
    parser.add_argument("--quick", action="store_true", help="narrow networks")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
