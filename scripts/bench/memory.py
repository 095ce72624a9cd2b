"""What `lora-kit plan --memory` reckons against what runs take, and what each way of saving memory saves and costs.

    python scripts/bench/memory.py [--tables reckoned,saved] [--only "nf4;all together"] [--precision bf16]
        [--kept 128] [--quick]

Each row plans its recipe, then trains it for a few steps in a process of its own, and shows the peaks of the run's
start (loading, encoding, measuring the base) and steps beside those that were reckoned, resident memory, MiB; and CPU
seconds of a step, the median of all but the first. `reckoned`: recipes/quickstart.yaml as it is, and changed, and a
base of Stable Diffusion 1.5's size with random weights, 256 px, batch 1, in bf16 or (`--precision no`) fp32. `saved`:
that base with each way of saving memory. `--folder` is where it lies, or is kept for the next time. `--kept`: below how
many MiB a freed block is kept for the next tensor, 128 in a run; with less there are fewer gaps, and steps take longer.
`--quick`: narrow networks, to see that the script runs. Memory does not mind what else the machine does; CPU seconds do
a little.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from families import stable_diffusion
from PIL import Image

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
STEPS = 4
SHORT = (f"train.max_steps={STEPS}", "schedule.warmup_steps=1", "save.every=0")
FEW = ("validation.every=0", "validation.steps=2", "validation.retrieval=false")
"""Validation before the first step and after the last, drawn in two steps."""
ATTENTION, CHECKPOINTS = "targets.preset=attention", "train.gradient_checkpointing=true"
DISK, EIGHT_BITS, NF4 = "data.cache=disk", "optimizer.name=adamw8bit", "model.quantize=nf4"
QUICKSTARTS: dict[str, tuple[str, ...]] = {
    "quickstart": (),
    "quickstart, batch 1": ("data.batch_size=1",),
    "quickstart, batch 32": ("data.batch_size=32",),
    "quickstart, attention": (ATTENTION,),
    "quickstart, gradient checkpointing": (CHECKPOINTS,),
    "quickstart, bf16": ("train.mixed_precision=bf16",),
}
LARGE: dict[str, tuple[str, ...]] = {
    "SD 1.5 size, attention": (),
    "SD 1.5 size, all": ("targets.preset=all",),
}
SAVED: dict[str, tuple[str, ...]] = {
    "nothing: VAE and text encoder in the step": ("data.cache=none",),
    "latents kept: VAE gone": ("data.cache=memory",),
    "latents and text states kept: both gone": (DISK,),
    "gradient checkpointing": (DISK, CHECKPOINTS),
    "8-bit optimizer": (DISK, EIGHT_BITS),
    "int8": (DISK, "model.quantize=int8"),
    "nf4": (DISK, NF4),
    "all together": (DISK, CHECKPOINTS, EIGHT_BITS, NF4),
}


class Row(NamedTuple):
    """A recipe with changes."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]


def main() -> None:
    options = _options()
    if options.row:
        print(json.dumps(_trained(*json.loads(options.row))))
        return
    wanted = options.only.split(";") if options.only else None
    with tempfile.TemporaryDirectory() as place:
        for table in options.tables.split(","):
            rows = [row for row in _rows(table, Path(place), options) if row.name in (wanted or [row.name])]
            print(f"\n**{table.capitalize()}**.\n")
            print("| | start: reckoned | measured | ratio | steps: reckoned | measured | ratio | CPU s a step |")
            print("|---|---|---|---|---|---|---|---|", flush=True)
            for row in rows:
                print(_line(row, Path(place), options.kept), flush=True)


def _rows(table: str, place: Path, options: argparse.Namespace) -> Iterator[Row]:
    changes = SAVED if table == "saved" else LARGE
    if table == "reckoned":
        for name, overrides in QUICKSTARTS.items():
            yield Row(name, QUICKSTART, (*SHORT, *FEW, *overrides))
    large = _large(Path(options.folder or place), place, options.quick)
    for name, overrides in changes.items():
        yield Row(name, large, (*SHORT, f"train.mixed_precision={options.precision}", *overrides))


def _line(row: Row, place: Path, kept: float) -> str:
    """A row of the table. Its cache begins empty."""
    with tempfile.TemporaryDirectory(dir=place) as out:
        overrides = [*row.overrides, f"output_dir={out}/run", f"data.cache_dir={out}/cache"]
        plan = _output(["-m", "lora_kit", "plan", str(row.recipe), *overrides, "--memory", "--json"])
        reckoned = json.loads(plan)["memory_bytes"]["expected_peaks"]
        asked = json.dumps([str(row.recipe), overrides, int(kept * 2**20)])
        found = json.loads(_output([__file__, "--row", asked]).splitlines()[-1])
    cells = [row.name]
    for stage in ("start", "steps"):
        told, taken = reckoned[stage] / 2**20, found["peaks"][stage] / 2**20
        cells += [f"{told:,.0f}", f"{taken:,.0f}", f"{told / taken:.2f}"]
    cells.append(f"{found['cpu_seconds']:.2f}")
    return f"| {' | '.join(cells)} |"


def _trained(recipe: str, overrides: Sequence[str], kept: int) -> dict[str, Any]:
    """Peaks and CPU seconds of a step of a run, in this process, set up as `lora-kit train` sets up its own but for the
    size, in bytes, below which freed blocks are kept."""
    from lora_kit.allocator import keep_freed_blocks
    from lora_kit.cli.quick_imports import quick_imports, uses_bitsandbytes
    from lora_kit.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    keep_freed_blocks(kept)
    with quick_imports(compiles=uses_bitsandbytes(loaded)):
        from lora_kit.training import run

    seconds, step = list[float](), run.take_step

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.process_time()
        done = step(*arguments, **options)
        seconds.append(time.process_time() - began)
        return done

    run.take_step = timed
    peak = run.train(loaded).peak
    assert peak is not None
    return {"peaks": peak.stages, "cpu_seconds": statistics.median(seconds[1:])}


def _output(arguments: list[str]) -> str:
    from lora_kit.allocator import few_held_back

    environment = few_held_back(os.environ)  # as commands do
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def _large(folder: Path, place: Path, quick: bool) -> Path:
    """The recipe over the large base, which is built if it is not there."""
    base = folder / ("sd15-quick" if quick else "sd15")
    if not (base / "model_index.json").is_file():
        stable_diffusion("SD 1.5", {}, {}, quick).save_pretrained(base)
    pictures = place / "pictures"
    if not pictures.is_dir():
        pictures.mkdir()
        Image.effect_noise((256, 256), 100).convert("RGB").save(pictures / "a.png")
        (pictures / "a.txt").write_text("a picture")
    recipe = {
        "model": {"base": str(base)},
        "targets": {"preset": "attention", "rank": 16},
        "data": {"sources": [{"path": "pictures"}], "resolution": 64 if quick else 256, "batch_size": 1},
        "train": {"trackers": []},
    }
    path = place / "large.yaml"
    path.write_text(json.dumps(recipe))
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default="reckoned,saved", help="reckoned, saved")
    parser.add_argument("--only", help=f"rows, separated by ;: {'; '.join([*QUICKSTARTS, *LARGE, *SAVED])}")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="of the large base; no: fp32")
    parser.add_argument("--folder", help="where the large base is, or is kept")
    parser.add_argument("--kept", type=float, default=128, help="freed blocks below so many MiB are kept (glibc)")
    parser.add_argument("--quick", action="store_true", help="narrow networks")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
